"""Triton kernels, one file per operation; installed as `fastgen.kernels`. Import a kernel's module only to run it."""
