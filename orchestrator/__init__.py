"""The controller of a run, its two runtimes, and the commands, records and pages that people see."""
