#compdef fsprov
# Completions of fsprov for zsh: fsprov itself says what can stand where you type.
_fsprov() {
    local line value
    local -a open closed shown
    for line in "${(@f)$(command ${(Q)words[1]} complete zsh $((CURRENT - 1)) -- "${(@Q)words[1,CURRENT]}" 2>/dev/null)}"; do
        value=${line%%$'\t'*}
        [[ -n $value ]] || continue
        if [[ $value == *[/=] ]]; then
            open+=("$value")
        else
            closed+=("$value")
            shown+=("$value  ${line#*$'\t'}")
        fi
    done
    (( $#open )) && compadd -S '' -a open
    (( $#closed )) && compadd -l -d shown -a closed
}
if [[ $funcstack[1] == _fsprov ]]; then _fsprov "$@"; else compdef _fsprov fsprov; fi
