# Completion of tunedock for bash 3.2 or newer. In ~/.bashrc:  eval "$(tunedock completion bash)"
#
# The program is asked for the words that fit; names of files are bash's own business, which knows about tildes and quotes.

# Leaves in REPLY what a word means; its quote may still be open.
_tunedock_unquoted() {
    case "$1" in
        \'*) REPLY="${1#\'}" REPLY="${REPLY%\'}" ;;
        \"*) REPLY="${1#\"}" REPLY="${REPLY%\"}" ;;
        *) REPLY="${1//\\/}" ;;
    esac
}

_tunedock() {
    local current="${COMP_WORDS[COMP_CWORD]}" program="${1/#\~/$HOME}"
    local -a words=()
    local word glue="" at line kind="" suffixes="" REPLY
    COMPREPLY=()

    # bash cuts words at = and : (COMP_WORDBREAKS); here they are whole again.
    for ((at = 1; at <= COMP_CWORD; at++)); do
        word="${COMP_WORDS[at]}"
        if [[ ${#words[@]} -gt 0 && ( -n "$glue" || "$word" == [=:]* ) ]]; then
            words[${#words[@]} - 1]+="$word"
        else
            words+=("$word")
        fi
        [[ "$word" == [=:] ]] && glue=1 || glue=""
    done
    [[ "$current" == [=:] ]] && current=""
    for at in "${!words[@]}"; do
        _tunedock_unquoted "${words[at]}"
        words[at]="$REPLY"
    done
    _tunedock_unquoted "$current"
    current="$REPLY"
    local whole="${words[${#words[@]} - 1]}"
    local before="${whole%"$current"}"

    while IFS= read -r line; do
        if [[ -z "$kind" ]]; then
            kind="${line%% *}"
            [[ "$line" == *" "* ]] && suffixes=" ${line#* } "
            continue
        fi
        line="${line%%$'\t'*}"
        line="${line#"$before"}"
        [[ "$line" == *= ]] && compopt -o nospace 2>/dev/null
        COMPREPLY+=("$line")
    done < <("$program" __complete "${words[@]}" 2>/dev/null)

    case "$kind" in
        :files | :folders)
            # Names are quoted by readline, those of runs too.
            compopt -o filenames 2>/dev/null
            while IFS= read -r line; do
                [[ -n "$suffixes" && ! -d "$line" && ! -d "${line/#\~/$HOME}" && "$suffixes" != *" .${line##*.} "* ]] && continue
                COMPREPLY+=("$line")
            done < <(if [[ "$kind" == :files ]]; then compgen -f -- "$current"; else compgen -d -- "$current"; fi)
            ;;
    esac
    return 0
}

complete -F _tunedock tunedock
