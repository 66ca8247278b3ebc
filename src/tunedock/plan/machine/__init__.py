"""What a machine has for training: the checks of `tunedock doctor` that need neither torch nor a working installation of it.

check.py        a finding: what, how much is wanted, the verdict, the way out
bounds.py       the table of minimum and recommended values
symptoms.py     the table of known errors and the ways out
command.py      other programs: argument lists, time limits
survey.py       all checks of this package, side by side and within a time limit

system.py, openmp.py, room.py, cards.py, packages.py, containers.py, network.py     the checks themselves

Every place they look at (`/proc`, `/sys`, a program, the environment) can be given, so that tests feed what other machines say.
"""
