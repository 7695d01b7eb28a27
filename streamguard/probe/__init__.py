"""The probe: meaning, read from the served model's own hidden states.

fit        data -> collect (vLLM, the serving tap) -> train -> calibrate -> Probe (one file)
serve      tap (scores in the forward pass) -> monitor (statistics, verdicts)
evaluate   Probe + data -> figures, baselines, plots
"""
