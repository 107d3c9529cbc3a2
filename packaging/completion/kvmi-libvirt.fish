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
    printf '%s\n' observe debug protect full
    for file in /etc/kvmi-libvirt/profiles.d/*.xml
        string replace -r '.*/(.*)\.xml$' '$1' $file
    end
end

complete -c kvmi-libvirt -f
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f

complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -l debug -d 'log every step, and show tracebacks'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -l version -d 'print the version'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -l help -d 'print a summary'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a check -d 'lint domain XML, an introspection element, a host policy or a profile'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a plan -d 'print the ioctls a policy amounts to, without doing them'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a explain -d 'say which policy applies, and which rule decided what'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a names -d 'list the commands, events, groups and profiles a policy can name'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a get -d 'print a domain'"'"'s introspection element'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a set -d 'put an introspection element into a domain'"'"'s metadata'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a unset -d 'take the introspection element out of a domain'"'"'s metadata'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a status -d 'show what is hooked, with which rights'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a doctor -d 'say what is wrong with this host, or why a VM is not hooked'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a start -d 'start a VM so that no instruction of it runs unwatched'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a hook -d 'hook a running VM now'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a unhook -d 'take introspection off a running VM'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a apply -d 'move a hooked VM to the policy it has now'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a allow -d 'give a hooked VM'"'"'s tool more rights now'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a deny -d 'take rights from a hooked VM'"'"'s tool now'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a probe -d 'be an introspection tool that asks the kernel what it may do'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a agent -d 'be the daemon that keeps introspection right'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a emulate -d 'run a command on an emulated KVMI kernel'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a install -d 'install the libvirt hook'
complete -c kvmi-libvirt -n 'not __kvmi_libvirt_verb' -a uninstall -d 'remove the libvirt hook'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using check' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using check' -l json -d 'print the findings as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using check' -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using plan' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using plan' -l abi -d 'the kernel'"'"'s KVMI revision (default: v12)' -r -a 'v12 v11 v7' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using plan' -l json -d 'print the plan as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using plan' -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using explain' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using explain' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using explain' -l abi -d 'the kernel'"'"'s KVMI revision (default' -r -a 'v12 v11 v7' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using explain' -l allowed -d 'leave out what is denied'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using explain' -l json -d 'print the explanation as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using explain' -a '(__kvmi_libvirt_domains --all)' -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using names' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using names' -l abi -d 'the kernel'"'"'s KVMI revision (default: v12)' -r -a 'v12 v11 v7' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using names' -l json -d 'print the names as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using names' -a 'KVMI_GET_VERSION KVMI_VCPU_CHANGE_GFN KVMI_VCPU_CONTROL_CR KVMI_VCPU_CONTROL_EPT_VIEW KVMI_VCPU_CONTROL_EVENTS KVMI_VCPU_CONTROL_MSR KVMI_VCPU_CONTROL_SINGLESTEP KVMI_VCPU_DISABLE_VE KVMI_VCPU_GET_CPUID KVMI_VCPU_GET_EPT_VIEW KVMI_VCPU_GET_INFO KVMI_VCPU_GET_MTRR_TYPE KVMI_VCPU_GET_REGISTERS KVMI_VCPU_GET_XCR KVMI_VCPU_GET_XSAVE KVMI_VCPU_INJECT_EXCEPTION KVMI_VCPU_SET_EPT_VIEW KVMI_VCPU_SET_REGISTERS KVMI_VCPU_SET_VE_INFO KVMI_VCPU_SET_XSAVE KVMI_VCPU_TRANSLATE_GVA KVMI_VM_CHECK_COMMAND KVMI_VM_CHECK_EVENT KVMI_VM_CONTROL_CLEANUP KVMI_VM_CONTROL_CMD_RESPONSE KVMI_VM_CONTROL_EVENTS KVMI_VM_CONTROL_SPP KVMI_VM_GET_INFO KVMI_VM_GET_MAP_TOKEN KVMI_VM_GET_MAX_GFN KVMI_VM_PAUSE_VCPU KVMI_VM_READ_PHYSICAL KVMI_VM_SET_PAGE_ACCESS KVMI_VM_SET_PAGE_SVE KVMI_VM_WRITE_PHYSICAL KVMI_EVENT_CMD_ERROR KVMI_EVENT_CPUID KVMI_EVENT_CREATE_VCPU KVMI_VCPU_EVENT_BREAKPOINT KVMI_VCPU_EVENT_CR KVMI_VCPU_EVENT_DESCRIPTOR KVMI_VCPU_EVENT_HYPERCALL KVMI_VCPU_EVENT_MSR KVMI_VCPU_EVENT_PAUSE KVMI_VCPU_EVENT_PF KVMI_VCPU_EVENT_SINGLESTEP KVMI_VCPU_EVENT_TRAP KVMI_VCPU_EVENT_XSETBV KVMI_VM_EVENT_UNHOOK query memory-read memory-write memory-protect registers-read registers-write events-control vcpu-control (__kvmi_libvirt_profiles)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using get' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using get' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using get' -l live -d 'of the running domain'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using get' -l config -d 'of its next start'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using get' -l json -d 'print it as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using get' -a '(__kvmi_libvirt_domains --all)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using set' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using set' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using set' -l live -d 'of the running domain'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using set' -l config -d 'of its next start'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using set' -a '(__kvmi_libvirt_domains --all)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using set' -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unset' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unset' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unset' -l live -d 'of the running domain'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unset' -l config -d 'of its next start'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unset' -a '(__kvmi_libvirt_domains --all)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using status' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using status' -l json -d 'print JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using status' -a '(__kvmi_libvirt_domains --all)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using doctor' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using doctor' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using doctor' -l emulated -d 'VMs here run on the emulated KVMI kernel: the host'"'"'s needs none'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using doctor' -l timeout -d 'how long libvirt may take for an answer (default: 10)' -r -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using doctor' -l json -d 'print the findings as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using doctor' -a '(__kvmi_libvirt_domains --all)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using start' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using start' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using start' -l json -d 'print the state as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using start' -a '(__kvmi_libvirt_domains --inactive)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using hook' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using hook' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using hook' -l pid -d 'instead of DOMAIN: a QEMU that libvirt does not run' -r -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using hook' -l xml -d 'with --pid' -r -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using hook' -l policy -d 'use this element, not what the host assigns nor the domain'"'"'s own' -r -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using hook' -l json -d 'print the state as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using hook' -a '(__kvmi_libvirt_domains)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unhook' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unhook' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unhook' -l pid -d 'instead of DOMAIN: a QEMU that libvirt does not run' -r -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unhook' -l xml -d 'with --pid' -r -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unhook' -l now -d 'do not ask the tool, nor wait for it to let go'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unhook' -l json -d 'print the state as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using unhook' -a '(__kvmi_libvirt_domains)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using apply' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using apply' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using apply' -l pid -d 'instead of DOMAIN: a QEMU that libvirt does not run' -r -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using apply' -l xml -d 'with --pid' -r -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using apply' -l json -d 'print the state as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using apply' -a '(__kvmi_libvirt_domains)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using allow' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using allow' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using allow' -l pid -d 'instead of DOMAIN: a QEMU that libvirt does not run' -r -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using allow' -l xml -d 'with --pid' -r -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using allow' -l json -d 'print the state as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using allow' -a '(__kvmi_libvirt_domains)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using allow' -a 'KVMI_GET_VERSION KVMI_VCPU_CHANGE_GFN KVMI_VCPU_CONTROL_CR KVMI_VCPU_CONTROL_EPT_VIEW KVMI_VCPU_CONTROL_EVENTS KVMI_VCPU_CONTROL_MSR KVMI_VCPU_CONTROL_SINGLESTEP KVMI_VCPU_DISABLE_VE KVMI_VCPU_GET_CPUID KVMI_VCPU_GET_EPT_VIEW KVMI_VCPU_GET_INFO KVMI_VCPU_GET_MTRR_TYPE KVMI_VCPU_GET_REGISTERS KVMI_VCPU_GET_XCR KVMI_VCPU_GET_XSAVE KVMI_VCPU_INJECT_EXCEPTION KVMI_VCPU_SET_EPT_VIEW KVMI_VCPU_SET_REGISTERS KVMI_VCPU_SET_VE_INFO KVMI_VCPU_SET_XSAVE KVMI_VCPU_TRANSLATE_GVA KVMI_VM_CHECK_COMMAND KVMI_VM_CHECK_EVENT KVMI_VM_CONTROL_CLEANUP KVMI_VM_CONTROL_CMD_RESPONSE KVMI_VM_CONTROL_EVENTS KVMI_VM_CONTROL_SPP KVMI_VM_GET_INFO KVMI_VM_GET_MAP_TOKEN KVMI_VM_GET_MAX_GFN KVMI_VM_PAUSE_VCPU KVMI_VM_READ_PHYSICAL KVMI_VM_SET_PAGE_ACCESS KVMI_VM_SET_PAGE_SVE KVMI_VM_WRITE_PHYSICAL KVMI_EVENT_CMD_ERROR KVMI_EVENT_CPUID KVMI_EVENT_CREATE_VCPU KVMI_VCPU_EVENT_BREAKPOINT KVMI_VCPU_EVENT_CR KVMI_VCPU_EVENT_DESCRIPTOR KVMI_VCPU_EVENT_HYPERCALL KVMI_VCPU_EVENT_MSR KVMI_VCPU_EVENT_PAUSE KVMI_VCPU_EVENT_PF KVMI_VCPU_EVENT_SINGLESTEP KVMI_VCPU_EVENT_TRAP KVMI_VCPU_EVENT_XSETBV KVMI_VM_EVENT_UNHOOK query memory-read memory-write memory-protect registers-read registers-write events-control vcpu-control' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using deny' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using deny' -s c -l connect -d 'libvirt to ask' -r -a 'qemu:///system qemu:///session qemu+ssh:// test:///default' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using deny' -l pid -d 'instead of DOMAIN: a QEMU that libvirt does not run' -r -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using deny' -l xml -d 'with --pid' -r -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using deny' -l json -d 'print the state as JSON'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using deny' -a '(__kvmi_libvirt_domains)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using deny' -a 'KVMI_GET_VERSION KVMI_VCPU_CHANGE_GFN KVMI_VCPU_CONTROL_CR KVMI_VCPU_CONTROL_EPT_VIEW KVMI_VCPU_CONTROL_EVENTS KVMI_VCPU_CONTROL_MSR KVMI_VCPU_CONTROL_SINGLESTEP KVMI_VCPU_DISABLE_VE KVMI_VCPU_GET_CPUID KVMI_VCPU_GET_EPT_VIEW KVMI_VCPU_GET_INFO KVMI_VCPU_GET_MTRR_TYPE KVMI_VCPU_GET_REGISTERS KVMI_VCPU_GET_XCR KVMI_VCPU_GET_XSAVE KVMI_VCPU_INJECT_EXCEPTION KVMI_VCPU_SET_EPT_VIEW KVMI_VCPU_SET_REGISTERS KVMI_VCPU_SET_VE_INFO KVMI_VCPU_SET_XSAVE KVMI_VCPU_TRANSLATE_GVA KVMI_VM_CHECK_COMMAND KVMI_VM_CHECK_EVENT KVMI_VM_CONTROL_CLEANUP KVMI_VM_CONTROL_CMD_RESPONSE KVMI_VM_CONTROL_EVENTS KVMI_VM_CONTROL_SPP KVMI_VM_GET_INFO KVMI_VM_GET_MAP_TOKEN KVMI_VM_GET_MAX_GFN KVMI_VM_PAUSE_VCPU KVMI_VM_READ_PHYSICAL KVMI_VM_SET_PAGE_ACCESS KVMI_VM_SET_PAGE_SVE KVMI_VM_WRITE_PHYSICAL KVMI_EVENT_CMD_ERROR KVMI_EVENT_CPUID KVMI_EVENT_CREATE_VCPU KVMI_VCPU_EVENT_BREAKPOINT KVMI_VCPU_EVENT_CR KVMI_VCPU_EVENT_DESCRIPTOR KVMI_VCPU_EVENT_HYPERCALL KVMI_VCPU_EVENT_MSR KVMI_VCPU_EVENT_PAUSE KVMI_VCPU_EVENT_PF KVMI_VCPU_EVENT_SINGLESTEP KVMI_VCPU_EVENT_TRAP KVMI_VCPU_EVENT_XSETBV KVMI_VM_EVENT_UNHOOK query memory-read memory-write memory-protect registers-read registers-write events-control vcpu-control' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -l listen -d 'where to listen; a stale socket there is replaced, and removed at the end' -r -a 'unix:/run/kvmi/' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -l once -d 'end after the result of the first VM that says hello'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -l hold -d 'with --once: keep the channel until the VM closes it'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -l watch -d 'go on asking, and print again whenever the answers have changed; implies --hold'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -l json -d 'print JSON: one document with --once, else one document a line'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -l secret -d 'prove to know the secret in FILE: the answer carries the SHA-1 of its raw bytes' -r -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -l timeout -d 'longest wait for a VM'"'"'s hello, for its hook, and for its answers (10.0)' -r -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -l settle -d 'how long the answers must not change to be final (0.3)' -r -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -l wait -d 'longest wait for the first VM to say hello (default: for ever)' -r -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using probe' -l abi -d 'the kernel'"'"'s KVMI revision (default: concluded from hello and answers)' -r -a 'v12 v11 v7' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using agent' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using agent' -l config -d 'instead of /etc/kvmi-libvirt/agent.conf' -r -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using agent' -l check-config -d 'read the configuration and end'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using emulate' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using emulate' -l abi -d 'the KVMI revision to emulate (default: v12)' -r -a 'v12 v11 v7' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using emulate' -l trace -d 'append a JSON line for each introspection ioctl' -r -F
complete -c kvmi-libvirt -n '__kvmi_libvirt_using emulate' -l stand-in -d 'serve kvmi_libvirt.emulator.standin, for machines without /dev/kvm'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using emulate' -l fault -d 'let the kernel do what this machine'"'"'s cannot show' -r -a 'introspection-off enomem eexist-after-unhook' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using emulate' -a '(complete -C (commandline -ct))' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using install' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using install' -l dry-run -d 'only say what would be done'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using install' -l root -d 'the root directory, for images and chroots (default: /)' -r -a '(__fish_complete_directories)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using install' -l prefix -d 'where man pages and completion go, below the root (default: /usr/local)' -r -a '(__fish_complete_directories)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using install' -l proxmox -d 'instead: Proxmox VE'"'"'s hookscript, in a storage'"'"'s snippets directory' -r -a '(__fish_complete_directories)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using install' -l reload -d 'make a running libvirt daemon notice, if it must'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using uninstall' -s h -l help -d 'show this help message and exit'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using uninstall' -l dry-run -d 'only say what would be done'
complete -c kvmi-libvirt -n '__kvmi_libvirt_using uninstall' -l root -d 'the root directory, for images and chroots (default: /)' -r -a '(__fish_complete_directories)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using uninstall' -l prefix -d 'where man pages and completion go, below the root (default: /usr/local)' -r -a '(__fish_complete_directories)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using uninstall' -l proxmox -d 'instead: Proxmox VE'"'"'s hookscript, in a storage'"'"'s snippets directory' -r -a '(__fish_complete_directories)' -f
complete -c kvmi-libvirt -n '__kvmi_libvirt_using uninstall' -l purge -d 'remove the configuration too, policy, profiles and secrets, and the logs'
