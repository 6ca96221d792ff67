"""Kernels: functions of plain arrays that cost less than what XLA would make of the obvious form, one to a file."""
