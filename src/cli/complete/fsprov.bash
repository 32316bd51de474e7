# Completions of fsprov for bash: fsprov itself says what can stand where you type.
_fsprov() {
    local typed=$2 line=${COMP_LINE:0:COMP_POINT} program=${COMP_WORDS[0]} word before i
    local -a words=()
    # bash ends a word at `:` and `=`; here it ends where a space does.
    for ((i = 0; i <= COMP_CWORD; i++)); do
        before=${line%%[![:space:]]*}
        line=${line#"$before"}
        word=${COMP_WORDS[i]}
        if ((i == COMP_CWORD)); then word=$line; fi
        line=${line#"$word"}
        if ((i > 0)) && [[ -z $before ]]; then words[-1]+=$word; else words+=("$word"); fi
    done
    type -P -- "$program" >/dev/null || program=fsprov
    local whole=${words[-1]} IFS=$'\n'
    local prefix=${whole%"$typed"}
    COMPREPLY=($(command "$program" complete bash $((${#words[@]} - 1)) -- "${words[@]}" 2>/dev/null))
    # What stands before the word that bash sees is there already.
    case $whole in *[:=]*) COMPREPLY=("${COMPREPLY[@]#"$prefix"}") ;; esac
    case ${COMPREPLY[0]-} in *[/=:]) compopt -o nospace ;; esac
}
complete -o nosort -F _fsprov fsprov
