"""How good a slim language model is: what it is measured on, against the dense one, and by whom.

`graphprune.calibration.measured` chooses the texts; here are the numbers (`compare`), continued
prompts (`completions`), what there is to say of them (`remarks`), and conditions that end a run
(`conditions`).
"""
