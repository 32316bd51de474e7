# Completions of fsprov for fish: fsprov itself says what can stand where you type.
function __fsprov_complete
    set -l words (commandline --current-process --tokenize --cut-at-cursor) (commandline --current-token --cut-at-cursor)
    command $words[1] complete fish (math (count $words) - 1) -- $words 2>/dev/null
end
complete --command fsprov --no-files --keep-order --arguments '(__fsprov_complete)'
