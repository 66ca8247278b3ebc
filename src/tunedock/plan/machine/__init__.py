"""What a machine has for training: the checks of `tunedock doctor` that need neither torch nor a working installation of it.

check.py        a finding: what, how much is wanted, the verdict, the way out
bounds.py       the table of minimum and recommended values
command.py      other programs: argument lists, time limits
survey.py       all checks of this package, at the same time and within a time limit
symptoms.py     what a known error means, and the way out
"""
