"""vLLM engines in this process whose model can be watched and steered: what calibration measures with."""
