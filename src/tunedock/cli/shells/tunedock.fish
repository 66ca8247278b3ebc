# Completion of tunedock for fish 3.1 or newer:  tunedock completion fish > ~/.config/fish/completions/tunedock.fish

function __tunedock_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program (string replace -r '^~' $HOME -- $words[1])
    set -l lines ($program __complete $words[2..-1] "$current" 2>/dev/null)
    set -l answer (string split ' ' -- $lines[1])
    if test (count $lines) -gt 1
        printf '%s\n' $lines[2..-1]
    end
    # A value behind `key=` or `--option=` is completed alone, and given back with what stands before it.
    set -l before (string match -r '^.*=' -- $current; or echo '')
    set -l rest (string replace -r '^.*=' '' -- $current)
    set -l found
    switch "$answer[1]"
        case :files
            set found (__fish_complete_path "$rest")
            if test (count $answer) -gt 1
                set -l endings (string join '|' (string escape --style=regex -- $answer[2..-1]))
                set found (string match -r '.*(?:/|'$endings')(?:\t.*)?$' -- $found)
            end
        case :folders
            set found (__fish_complete_directories "$rest" '')
    end
    test (count $found) -gt 0; and printf '%s\n' $before$found
end

complete --command tunedock --no-files --arguments '(__tunedock_complete)'
