"""Measures for the planner (`cluster/planning`): what its calibration needs, and whether it is right."""
