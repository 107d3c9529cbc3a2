#compdef kvmi-libvirt
# SPDX-License-Identifier: Apache-2.0
# Made by "make generated" from the command's own options: change those instead.

_kvmi_libvirt_domains() {
  local uri=${opt_args[-c]:-${opt_args[--connect]:-qemu:///system}}
  uri=${uri//\\:/:}
  local -a domains
  domains=(${(f)"$(timeout 2 virsh --quiet --readonly --connect $uri list --all --name 2>/dev/null)"})
  compadd -X domain -- $domains
}

_kvmi_libvirt_rights() {
  local -a rights=(@RIGHTS@)
  compadd -X 'command, event or group' -- $rights
}

_kvmi_libvirt_names() {
  local -a profiles=(@PROFILES@ /etc/kvmi-libvirt/profiles.d/*.xml(N:t:r))
  _kvmi_libvirt_rights
  compadd -X profile -- $profiles
}

_kvmi_libvirt_files_or_domains() {
  _kvmi_libvirt_domains
  _files
}

_kvmi_libvirt() {
  local curcontext=$curcontext state line
  local -A opt_args
  local -a verbs=(
@VERBS@
  )
  _arguments -C \
@GLOBAL@
    '1:verb:->verb' \
    '*::argument:->argument' && return
  case $state in
  verb) _describe -t verbs verb verbs ;;
  argument)
    curcontext=${curcontext%:*}-$line[1]:
    case $line[1] in
@CASES@
    esac
    ;;
  esac
}

_kvmi_libvirt "$@"
