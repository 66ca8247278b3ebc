#compdef tunedock
# Completion of tunedock for zsh. In ~/.zshrc:  eval "$(tunedock completion zsh)"
# or as a file named _tunedock in a folder of $fpath.

_tunedock() {
    local program="${(Q)words[1]}" kind line
    program="${program/#\~/$HOME}"
    local -a typed lines found suffixes
    typed=("${(@Q)words[2,CURRENT]}")
    typed[-1]="${typed[-1]#[\"\']}"  # a quote that is still open
    lines=("${(@f)$("$program" __complete "${(@)typed}" 2>/dev/null)}")
    kind="${lines[1]%% *}"
    [[ "${lines[1]}" == *' '* ]] && suffixes=(${=lines[1]#* })

    local -a open
    for line in "${(@)lines[2,-1]}"; do
        local value="${line%%$'\t'*}" about=""
        [[ "$line" == *$'\t'* ]] && about="${line#*$'\t'}"
        value="${value//:/\\:}"
        if [[ "$value" == *= ]]; then open+=("$value"); else found+=("${value}${about:+:$about}"); fi
    done
    (( $#found )) && _describe -t words 'tunedock' found
    (( $#open )) && _describe -t keys 'key' open -S ''

    case "$kind" in
        :files | :folders)
            compset -P '*='
            if [[ "$kind" == :folders ]]; then _files -/
            elif (( $#suffixes )); then _files -g "*(${(j:|:)suffixes})"
            else _files
            fi
            ;;
    esac
    return 0
}

if [[ "${funcstack[1]}" == _tunedock ]]; then
    _tunedock "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
    compdef _tunedock tunedock
fi
