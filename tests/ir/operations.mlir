// RUN: mxloom-opt %s | filecheck %s
// RUN: mxloom-opt %s --print-op-generic | mxloom-opt | filecheck %s

// Every operation in its own text form, dynamic sizes as values among the numbers.

func.func @contractions(%x: tensor<?x64xf32>, %y: tensor<?x?x64xf32>, %image: tensor<?x3x16x16xf32>, %index: tensor<?xi64>) {
  %weight = mx.parameter "proj.weight" : tensor<32x64xf32>
  %bias = mx.parameter "proj.bias" : tensor<32xf32>
  %kernel = mx.parameter "conv.weight" : tensor<8x3x3x3xf32>
  %experts = mx.parameter "experts.weight" : tensor<4x16x64xf32>
  %transposed = mx.parameter "conv1d.weight" : tensor<64x32xf32>
  // CHECK: %proj = mx.linear %y, %weight : (tensor<?x?x64xf32>, tensor<32x64xf32>) -> tensor<?x?x32xf32>
  %proj = mx.linear %y, %weight : (tensor<?x?x64xf32>, tensor<32x64xf32>) -> tensor<?x?x32xf32>
  // CHECK: %conv1d = mx.linear %x, %transposed, %bias, transposed : (tensor<?x64xf32>, tensor<64x32xf32>, tensor<32xf32>) -> tensor<?x32xf32>
  %conv1d = mx.linear %x, %transposed, %bias, transposed : (tensor<?x64xf32>, tensor<64x32xf32>, tensor<32xf32>) -> tensor<?x32xf32>
  // CHECK: %product = mx.matmul %y, %transposed : (tensor<?x?x64xf32>, tensor<64x32xf32>) -> tensor<?x?x32xf32>
  %product = mx.matmul %y, %transposed : (tensor<?x?x64xf32>, tensor<64x32xf32>) -> tensor<?x?x32xf32>
  // CHECK: %conv = mx.conv %image, %kernel, stride = [2, 2], padding = [1, 1] : (tensor<?x3x16x16xf32>, tensor<8x3x3x3xf32>) -> tensor<?x8x8x8xf32>
  %conv = mx.conv %image, %kernel, stride = [2, 2], padding = [1, 1] : (tensor<?x3x16x16xf32>, tensor<8x3x3x3xf32>) -> tensor<?x8x8x8xf32>
  // CHECK: %routed = mx.expert_linear %x, %experts, %index : (tensor<?x64xf32>, tensor<4x16x64xf32>, tensor<?xi64>) -> tensor<?x16xf32>
  %routed = mx.expert_linear %x, %experts, %index : (tensor<?x64xf32>, tensor<4x16x64xf32>, tensor<?xi64>) -> tensor<?x16xf32>
  // CHECK: %embedded = mx.embedding %weight, %index, padding_idx = 0 : (tensor<32x64xf32>, tensor<?xi64>) -> tensor<?x64xf32>
  %embedded = mx.embedding %weight, %index, padding_idx = 0 : (tensor<32x64xf32>, tensor<?xi64>) -> tensor<?x64xf32>
  func.return
}

func.func @attention(%q: tensor<?x4x?x16xf32>, %k: tensor<?x2x?x16xf32>, %pad: tensor<?x?xi1>, %cos: tensor<?x1x?x16xf32>) {
  // CHECK: %rotated = mx.rope %q, %cos, %cos : (tensor<?x4x?x16xf32>, tensor<?x1x?x16xf32>, tensor<?x1x?x16xf32>) -> tensor<?x4x?x16xf32>
  %rotated = mx.rope %q, %cos, %cos : (tensor<?x4x?x16xf32>, tensor<?x1x?x16xf32>, tensor<?x1x?x16xf32>) -> tensor<?x4x?x16xf32>
  // CHECK: %seen = mx.attention %q, %k, %k, %pad, scale = 0.25, causal, window = 6 : (tensor<?x4x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x?xi1>) -> tensor<?x4x?x16xf32>
  %seen = mx.attention %q, %k, %k, %pad, scale = 0.25, causal, window = 6 : (tensor<?x4x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x?xi1>) -> tensor<?x4x?x16xf32>
  %sinks = mx.parameter "sinks" : tensor<4xf32>
  // CHECK: %sunk = mx.attention %q, %k, %k, sinks = %sinks, scale = 0.25 : (tensor<?x4x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x2x?x16xf32>, tensor<4xf32>) -> tensor<?x4x?x16xf32>
  %sunk = mx.attention %q, %k, %k, sinks = %sinks, scale = 0.25 : (tensor<?x4x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x2x?x16xf32>, tensor<4xf32>) -> tensor<?x4x?x16xf32>
  // CHECK: %kept = mx.attention %q, %k, %k, wide_key = %k, scale = 0.25, causal, key_wide = 1, key_step = 8 : (tensor<?x4x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x2x?x16xf32>) -> tensor<?x4x?x16xf32>
  %kept = mx.attention %q, %k, %k, wide_key = %k, scale = 0.25, causal, key_wide = 1, key_step = 8 : (tensor<?x4x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x2x?x16xf32>) -> tensor<?x4x?x16xf32>
  // CHECK: %spread = mx.hadamard %q, size = 16, seed = 1 : (tensor<?x4x?x16xf32>) -> tensor<?x4x?x16xf32>
  %spread = mx.hadamard %q, size = 16, seed = 1 : (tensor<?x4x?x16xf32>) -> tensor<?x4x?x16xf32>
  // CHECK: probabilities = !mx.block<16xf4E2M1FN, f8E4M3FN, f32>, scale_rule = "absmax", rounding = "rna"
  %narrow = mx.attention %q, %k, %k, scale = 0.25, probabilities = !mx.block<16xf4E2M1FN, f8E4M3FN, f32>, scale_rule = "absmax", rounding = "rna" : (tensor<?x4x?x16xf32>, tensor<?x2x?x16xf32>, tensor<?x2x?x16xf32>) -> tensor<?x4x?x16xf32>
  func.return
}

func.func @normalization(%x: tensor<?x64xf32>, %image: tensor<?x8x4x4xf32>) {
  %w = mx.parameter "norm.weight" : tensor<64xf32>
  %c = mx.parameter "channels" : tensor<8xf32>
  // CHECK: %rms = mx.rms_norm %x, %w, eps = 1.0e-06, unit_offset : (tensor<?x64xf32>, tensor<64xf32>) -> tensor<?x64xf32>
  %rms = mx.rms_norm %x, %w, eps = 1.0e-06, unit_offset : (tensor<?x64xf32>, tensor<64xf32>) -> tensor<?x64xf32>
  // CHECK: %ln = mx.layer_norm %x, bias = %w, normalized_shape = [64], eps = 1.0e-12 : (tensor<?x64xf32>, tensor<64xf32>) -> tensor<?x64xf32>
  %ln = mx.layer_norm %x, bias = %w, normalized_shape = [64], eps = 1.0e-12 : (tensor<?x64xf32>, tensor<64xf32>) -> tensor<?x64xf32>
  // CHECK: %bn = mx.batch_norm %image, %c, %c, %c, %c, eps = 1.0e-05 : (tensor<?x8x4x4xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>) -> tensor<?x8x4x4xf32>
  %bn = mx.batch_norm %image, %c, %c, %c, %c, eps = 1.0e-05 : (tensor<?x8x4x4xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>) -> tensor<?x8x4x4xf32>
  // CHECK: %gn = mx.group_norm %image, %c, %c, num_groups = 2 :
  %gn = mx.group_norm %image, %c, %c, num_groups = 2 : (tensor<?x8x4x4xf32>, tensor<8xf32>, tensor<8xf32>) -> tensor<?x8x4x4xf32>
  // CHECK: %p = mx.softmax %x, dim = -1, dtype = f32 : (tensor<?x64xf32>) -> tensor<?x64xf32>
  %p = mx.softmax %x, dim = -1, dtype = f32 : (tensor<?x64xf32>) -> tensor<?x64xf32>
  func.return
}

func.func @elements(%x: tensor<?x64xf32>, %row: tensor<64xf32>) {
  // CHECK: mx.add %x, %row : (tensor<?x64xf32>, tensor<64xf32>) -> tensor<?x64xf32>
  %a = mx.add %x, %row : (tensor<?x64xf32>, tensor<64xf32>) -> tensor<?x64xf32>
  // CHECK: mx.mul %a, scalar = 2 : (tensor<?x64xf32>) -> tensor<?x64xf32>
  %b = mx.mul %a, scalar = 2 : (tensor<?x64xf32>) -> tensor<?x64xf32>
  // CHECK: mx.pow %b, exponent = 2.0 : (tensor<?x64xf32>) -> tensor<?x64xf32>
  %c = mx.pow %b, exponent = 2.0 : (tensor<?x64xf32>) -> tensor<?x64xf32>
  // CHECK: mx.gelu %c, approximate = "tanh" : (tensor<?x64xf32>) -> tensor<?x64xf32>
  %d = mx.gelu %c, approximate = "tanh" : (tensor<?x64xf32>) -> tensor<?x64xf32>
  // CHECK: mx.clamp %d, min = -1.5, max = <0x7ff0000000000000 : f64> : (tensor<?x64xf32>) -> tensor<?x64xf32>
  %e = mx.clamp %d, min = -1.5, max = <0x7ff0000000000000 : f64> : (tensor<?x64xf32>) -> tensor<?x64xf32>
  // CHECK: mx.convert %e : (tensor<?x64xf32>) -> tensor<?x64xbf16>
  %f = mx.convert %e : (tensor<?x64xf32>) -> tensor<?x64xbf16>
  // CHECK: mx.topk %x, k = 2, largest = false : (tensor<?x64xf32>) -> (tensor<?x2xf32>, tensor<?x2xi64>)
  %values, %places = mx.topk %x, k = 2, largest = false : (tensor<?x64xf32>) -> (tensor<?x2xf32>, tensor<?x2xi64>)
  // CHECK: mx.mean %x, dim = [-1], keepdim : (tensor<?x64xf32>) -> tensor<?x1xf32>
  %mean = mx.mean %x, dim = [-1], keepdim : (tensor<?x64xf32>) -> tensor<?x1xf32>
  func.return
}

func.func @movement(%x: tensor<?x64xf32>, %ids: tensor<?x?xi64>) {
  // CHECK: %length = mx.size %ids, dim = 1 : (tensor<?x?xi64>) -> index
  %length = mx.size %ids, dim = 1 : (tensor<?x?xi64>) -> index
  // CHECK: mx.reshape %x, shape = [-1, %length, 4, 16] : (tensor<?x64xf32>, index) -> tensor<?x?x4x16xf32>
  %heads = mx.reshape %x, shape = [-1, %length, 4, 16] : (tensor<?x64xf32>, index) -> tensor<?x?x4x16xf32>
  // CHECK: mx.slice %heads, dim = 1, start = 1, end = %length, step = 2 : (tensor<?x?x4x16xf32>, index) -> tensor<?x?x4x16xf32>
  %some = mx.slice %heads, dim = 1, start = 1, end = %length, step = 2 : (tensor<?x?x4x16xf32>, index) -> tensor<?x?x4x16xf32>
  // CHECK: mx.permute %some, dims = [0, 2, 1, 3] : (tensor<?x?x4x16xf32>) -> tensor<?x4x?x16xf32>
  %turned = mx.permute %some, dims = [0, 2, 1, 3] : (tensor<?x?x4x16xf32>) -> tensor<?x4x?x16xf32>
  // CHECK: %[[A:.*]], %[[B:.*]] = mx.split %x, split_sizes = [16, 48], dim = 1 : (tensor<?x64xf32>) -> (tensor<?x16xf32>, tensor<?x48xf32>)
  %first, %second = mx.split %x, split_sizes = [16, 48], dim = 1 : (tensor<?x64xf32>) -> (tensor<?x16xf32>, tensor<?x48xf32>)
  // CHECK: mx.concat [%[[B]], %[[A]]], dim = -1 : (tensor<?x48xf32>, tensor<?x16xf32>) -> tensor<?x64xf32>
  %joined = mx.concat [%second, %first], dim = -1 : (tensor<?x48xf32>, tensor<?x16xf32>) -> tensor<?x64xf32>
  func.return
}

func.func @rounding(%x: tensor<?x64xf32>) {
  // CHECK: mx.cast %x {scale_rule = "floor", clip = 8.750000e-01 : f64} : tensor<?x64xf32> to tensor<?x64x!mx.block<32xf4E2M1FN>>
  %a = mx.cast %x {scale_rule = "floor", clip = 0.875} : tensor<?x64xf32> to tensor<?x64x!mx.block<32xf4E2M1FN>>
  // CHECK: mx.cast %a : tensor<?x64x!mx.block<32xf4E2M1FN>> to tensor<?x64x!mx.block<32x!mx.fixed<8, 6>>>
  %b = mx.cast %a : tensor<?x64x!mx.block<32xf4E2M1FN>> to tensor<?x64x!mx.block<32x!mx.fixed<8, 6>>>
  func.return
}

func.func @opaque(%ids: tensor<?x?xi64>) {
  // CHECK: mx.size %ids, dim = 1
  %n = mx.size %ids, dim = 1 : (tensor<?x?xi64>) -> index
  // CHECK: mx.sym "operator.add"(%{{.*}}) {a0, a1 = 1 : i64} : (index) -> index
  %m = mx.sym "operator.add" (%n) {a0, a1 = 1 : i64} : (index) -> index
  // CHECK: mx.aten "aten.arange.default"(%{{.*}}) {end, dtype = i64} : (index) -> tensor<?xi64>
  %p = mx.aten "aten.arange.default" (%m) {end, dtype = i64} : (index) -> tensor<?xi64>
  func.return
}
