"""Bundles: all a machine without a network needs, in one folder of plain files that are checked before they are believed.

bundle.json            what it is: name, images, how large, what it builds on
install.sh             installs it with a POSIX shell, sha256sum, and Docker or Python where images or wheels are inside
FILES                  sum and path of every file it stands for, whole, whether it lies here or in an older bundle
images/  wheels/  content/      those files, or their parts (`model.safetensors.part0000`)
SHA256SUMS             sum and path of every file that lies here
SHA256SUMS.sig         ed25519 over SHA256SUMS, where someone signed it

So one signature covers everything, a diff is a bundle in which some of FILES do not lie here, and `sha256sum -c` and `openssl` are
enough to check one by hand.
"""
