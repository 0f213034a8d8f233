"""Files: data sets, checkpoints, PEFT adapters, the recovery half of an adapter. safetensors and JSON only; nothing is unpickled."""
