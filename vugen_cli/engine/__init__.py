"""The one shared engine: the loop, processes, state, precision, logs. It knows no stage."""
