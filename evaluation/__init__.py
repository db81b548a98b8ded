"""The paper's tables, ablations and analyses: lmms-eval as the engine."""
