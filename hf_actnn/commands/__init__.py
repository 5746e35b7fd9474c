"""The parts of the command line that answer questions about memory: `hf-actnn profile` and `hf-actnn estimate`."""
