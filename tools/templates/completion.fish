# SPDX-License-Identifier: Apache-2.0
# Made by "make generated" from the command's own options: change those instead.

function __kvmi_libvirt_verb
    # Prints the verb on the command line; fails while there is none.
    set -l is_value no
    for word in (commandline -opc)[2..-1]
        if test $is_value = yes
            set is_value no
            continue
        end
        switch $word
            case -c --connect
                set is_value yes # its URI follows
            case '-*'
            case '*'
                echo $word
                return 0
        end
    end
    return 1
end

function __kvmi_libvirt_using
    set -l verb (__kvmi_libvirt_verb)
    and contains -- $verb $argv
end

function __kvmi_libvirt_domains
    # Which domains: --all, --inactive, or those that run.
    set -l uri qemu:///system
    set -l words (commandline -opc)
    for i in (seq (count $words))
        switch $words[$i]
            case -c --connect
                set -q words[(math $i + 1)]
                and set uri $words[(math $i + 1)]
            case '--connect=*'
                set uri (string replace -- --connect= '' $words[$i])
        end
    end
    timeout 2 virsh --quiet --readonly --connect $uri list $argv --name 2>/dev/null | string match -r '.+'
end

function __kvmi_libvirt_profiles
    printf '%s\n' @PROFILES@
    for file in /etc/kvmi-libvirt/profiles.d/*.xml
        string replace -r '.*/(.*)\.xml$' '$1' $file
    end
end

complete -c kvmi-libvirt -f
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -s c -l connect -d 'libvirt to ask' -r -a '@URIS@' -f
