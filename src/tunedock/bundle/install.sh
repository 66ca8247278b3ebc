#!/bin/sh
# Installs this bundle where there is no network and no tunedock:
#
#     sh install.sh [--to DIR] [--old DIR] [--trust KEY.pub] [--no-images] [--no-wheels]
#
# It checks every file against SHA256SUMS, copies the content, makes an environment of the wheels and loads the images. Called again
# after it was stopped, it goes on. A bundle that holds the changes to an older one takes the rest from there (--old).
#
# The sums find damage. Whoever could change the files could change the sums and this script too: before you run it, check who signed
# them, with a key that did not come along with the bundle:
#
#     openssl pkeyutl -verify -pubin -inkey KEY.pub -rawin -in SHA256SUMS -sigfile SHA256SUMS.sig
set -eu

fail() {
    printf 'error: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf 'hint: %s\n' "$2" >&2
    exit 6
}

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
to=$(pwd)/$(basename -- "$here").installed
old=
trust=
images=yes
wheels=yes
while [ $# -gt 0 ]; do
    case $1 in
        --to | --old | --trust)
            [ $# -gt 1 ] || fail "$1 wants a path"
            case $2 in /*) path=$2 ;; *) path=$(pwd)/$2 ;; esac
            case $1 in --to) to=$path ;; --old) old=$path ;; --trust) trust=$path ;; esac
            shift 2
            ;;
        --no-images) images=no; shift ;;
        --no-wheels) wheels=no; shift ;;
        *) fail "unknown option: $1" "sh install.sh [--to DIR] [--old DIR] [--trust KEY.pub] [--no-images] [--no-wheels]" ;;
    esac
done

if command -v sha256sum >/dev/null 2>&1; then
    sums() { sha256sum "$@"; }
elif command -v shasum >/dev/null 2>&1; then
    sums() { shasum -a 256 "$@"; }
else
    fail "neither sha256sum nor shasum is installed"
fi
sum_of() { sums <"$1" | cut -d ' ' -f 1; }

# 1. Who made it, where a key is given.
if [ -n "$trust" ]; then
    command -v openssl >/dev/null 2>&1 || fail "openssl is not installed, which checks signatures" "check it elsewhere, or leave --trust out"
    [ -f "$here/SHA256SUMS.sig" ] || fail "nobody signed this bundle"
    openssl pkeyutl -verify -pubin -inkey "$trust" -rawin -in "$here/SHA256SUMS" -sigfile "$here/SHA256SUMS.sig" >/dev/null 2>&1 ||
        fail "SHA256SUMS.sig: the signature is not by the key $trust" "someone else made this bundle or changed it; install nothing of it"
fi

# 2. That the lists name nothing outside, that there are no links, that every byte is right.
for list in SHA256SUMS FILES; do
    [ -f "$here/$list" ] && [ ! -h "$here/$list" ] || fail "$list: the file is missing" "copy the bundle again"
    while IFS= read -r line; do
        case ${line#*  } in
            */../* | */./* | */.. | */. | *//*) fail "$list: a path leaves the bundle: $line" ;;
            content/* | images/* | wheels/* | FILES | bundle.json | install.sh) ;;
            *) fail "$list: a path that is none of a bundle's: $line" ;;
        esac
    done <"$here/$list"
done
[ -z "$(find "$here" -type l)" ] || fail "there is a link in the bundle: $(find "$here" -type l | head -n 1)"
strange=$(find "$here" ! -type f ! -type d | head -n 1)
[ -z "$strange" ] || fail "this is no plain file: $strange" "install nothing of it"
strange=$(
    cd "$here" && find . -type f | LC_ALL=C awk '
        BEGIN {
            while ((getline line <"SHA256SUMS") > 0) { sub(/^[^ ]*  /, "", line); known["./" line] }
            known["./SHA256SUMS"]; known["./SHA256SUMS.sig"]
        }
        !($0 in known) { print; exit }'
)
[ -z "$strange" ] || fail "SHA256SUMS does not name this file: $strange" "remove it if you know whose it is; else install nothing of it"
echo "checking ..."
wrong=$(cd "$here" && sums -c SHA256SUMS 2>/dev/null | sed '/: OK$/d') || true
[ -z "$wrong" ] || fail "$wrong" "copy the bundle again; if it stays so, it was changed: install nothing of it"
(cd "$here" && sums -c SHA256SUMS >/dev/null 2>&1) || fail "SHA256SUMS does not hold" "copy the bundle again"

while IFS= read -r line; do
    path=${line#*  }
    case $path in
        wheels/*) [ $wheels = yes ] || continue ;;
        images/*) [ $images = yes ] || continue ;;
    esac
    for folder in "$here" "$old"; do
        { [ -z "$folder" ] || { [ ! -f "$folder/$path" ] && [ ! -f "$folder/$path.part0000" ]; }; } || continue 2
    done
    fail "$path: the file is in an older bundle" "name it by --old; bundle.json says which"
done <"$here/FILES"

need=$(du -sk "$here" | cut -f 1)
mkdir -p "$to" || fail "$to: this folder cannot be made" "give another place by --to"
free=$(df -Pk "$to" | awk 'NR == 2 { print $4 }')
[ "$free" -gt "$need" ] || fail "$to: $need KiB are to be written and $free KiB are free" "give another place by --to"

# 3. Files, whole or joined of their parts, from here or the older bundle; each checked where it comes to lie.
place() { # SUM PATH TO
    if [ -f "$3" ] && [ ! -h "$3" ] && [ "$(sum_of "$3")" = "$1" ]; then return; fi
    mkdir -p "$(dirname -- "$3")"
    if [ -f "$here/$2" ]; then
        cat "$here/$2" >"$3.part"
    elif [ -f "$here/$2.part0000" ]; then
        cat "$here/$2".part[0-9]* >"$3.part"
    elif [ -n "$old" ] && [ -f "$old/$2" ]; then
        cat "$old/$2" >"$3.part"
    elif [ -n "$old" ] && [ -f "$old/$2.part0000" ]; then
        cat "$old/$2".part[0-9]* >"$3.part"
    else
        fail "$2: the file is in an older bundle" "name it by --old; bundle.json says which"
    fi
    [ "$(sum_of "$3.part")" = "$1" ] || fail "$2: the file is not what FILES says" "copy the bundle again"
    mv -f "$3.part" "$3"
}

rm -rf "$to/.wheels"
while IFS= read -r line; do
    sum=${line%%  *}
    path=${line#*  }
    case $path in
        content/*) place "$sum" "$path" "$to/${path#content/}" ;;
        wheels/*) [ $wheels = no ] || place "$sum" "$path" "$to/.wheels/${path#wheels/}" ;;
        images/*) [ $images = no ] || place "$sum" "$path" "$to/.images/${path#images/}" ;;
    esac
done <"$here/FILES"
[ ! -f "$to/compose.yaml" ] || printf 'TUNEDOCK_USER=%s:%s\n' "$(id -u)" "$(id -g)" >"$to/.env"

# 4. An environment of exactly the wheels.
if [ -d "$to/.wheels" ]; then
    echo "installing wheels ..."
    python3 -m venv "$to/venv" || fail "python3 makes no environment" "install python3 and its venv, or leave the wheels out by --no-wheels"
    "$to/venv/bin/python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check "$to"/.wheels/*.whl ||
        fail "the wheels cannot be installed" "they may be for another Python or machine; --no-wheels leaves them out"
    rm -rf "$to/.wheels"
fi

# 5. The images.
if [ -d "$to/.images" ]; then
    echo "loading images ..."
    engine=docker
    command -v docker >/dev/null 2>&1 || engine=podman
    command -v $engine >/dev/null 2>&1 || fail "neither docker nor podman is installed" "--no-images leaves the images out"
    (cd "$to/.images" && tar -cf - ./*) | $engine load || fail "$engine cannot load the images" "is it running? may you talk to it?"
    rm -rf "$to/.images"
fi

echo "installed to $to"
if [ -f "$to/compose.yaml" ]; then
    echo "next: cd '$to' && docker compose run --rm train"
elif [ -x "$to/venv/bin/tunedock" ] && [ -f "$to/recipe.yaml" ]; then
    echo "next: '$to/venv/bin/tunedock' train '$to/recipe.yaml'"
fi
