"""The stages of a dataflow design: one file for each kind."""
