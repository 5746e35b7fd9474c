"""What other libraries need to meet hf_actnn. Only these files import those libraries, and only when asked for."""
