#!/bin/sh
# Writes the King James Bible as plain text (4 MB, public domain). It comes from two Debian packages and needs no root.
#
#     sh recipes/pretrain/get_text.sh [FOLDER]        writes FOLDER/kjv.txt, default runs/text
#
# This needs a Debian or Ubuntu system. Elsewhere give pretrain.py text files of your own, or --dataset.
set -eu
folder=${1:-runs/text}
mkdir -p "$folder"
cd "$folder"
# apt-get may warn that the download is not sandboxed, which does no harm
apt-get download bible-kjv bible-kjv-text
for package in bible-kjv*.deb; do dpkg -x "$package" packages; done
packages/usr/bin/bible -f -p packages/usr/lib gen1:1-rev22:21 > verses
# "Gen1:1 In the beginning": drop the reference, and start a new paragraph with each chapter
awk '{ split($1, at, ":"); if (NR > 1 && at[1] != chapter) print ""; chapter = at[1]; $1 = ""; print substr($0, 2) }' \
    verses > kjv.txt
rm -r packages verses bible-kjv*.deb
wc -c "$PWD/kjv.txt"
