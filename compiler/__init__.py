"""The way from a model to artefacts: capture, import, recipe, driver, command line, evaluation, report."""
