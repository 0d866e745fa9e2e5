"""fastgen's microbenchmarks: every row carries the limit of the machine it ran on.  See bench/README.md."""
