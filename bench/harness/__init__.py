"""The parts of a benchmark run: cases, measuring, ceilings, rows, reports, the gate of tests, revisions."""
