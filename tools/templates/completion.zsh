#compdef kvmi-libvirt
# SPDX-License-Identifier: Apache-2.0
# Made by "make generated" from the command's own options: change those instead.

# Which domains: --all, --inactive, or those that run.
_kvmi_libvirt_domains_of() {
  local uri=${opt_args[-c]:-${opt_args[--connect]:-$before_verb}}
  uri=${uri//\\:/:}
  local -a domains
  domains=(${(f)"$(timeout 2 virsh --quiet --readonly --connect $uri list $1 --name 2>/dev/null)"})
  compadd -X domain -- $domains
}

_kvmi_libvirt_domains() { _kvmi_libvirt_domains_of --all }
_kvmi_libvirt_running() { _kvmi_libvirt_domains_of }
_kvmi_libvirt_stopped() { _kvmi_libvirt_domains_of --inactive }

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
  local curcontext=$curcontext state line before_verb
  local -A opt_args
  local -a verbs=(
@VERBS@
  )
  _arguments -C -A '-*' \
@GLOBAL@
    '(-c --connect)'{-c,--connect=}'[libvirt to ask]:URI:@ZSH_URIS@' \
    '1:verb:->verb' \
    '*::argument:->argument' && return
  before_verb=${opt_args[-c]:-${opt_args[--connect]:-qemu:///system}}
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
