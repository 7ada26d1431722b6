"""The parts of the training program: its command line, its state, what it measures, and what it leaves behind."""
