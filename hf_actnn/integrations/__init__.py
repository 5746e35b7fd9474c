"""What other libraries need to meet hf_actnn. Only the files in here import those libraries, and only when asked for."""
