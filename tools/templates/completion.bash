# SPDX-License-Identifier: Apache-2.0
# Made by "make generated" from the command's own options: change those instead.
# shellcheck shell=bash disable=SC2207

# Which domains: --all, --inactive, or those that run. As a shell needs them, since a name may
# hold spaces; or as they are, for where bash quotes what it takes for names of files.
_kvmi_libvirt_domains() {
	local uri=qemu:///system i domain
	for ((i = 1; i < cword; i++)); do
		case ${words[i]} in
		-c | --connect) uri=${words[i + 1]} ;;
		--connect=*) uri=${words[i]#*=} ;;
		esac
	done
	while IFS= read -r domain; do
		[[ -n $domain && $domain == "$cur"* ]] || continue
		[[ ${2:-} == plain ]] || domain=$(printf %q "$domain")
		COMPREPLY+=("$domain")
	done < <(timeout 2 virsh --quiet --readonly --connect "$uri" list ${1:+"$1"} --name 2>/dev/null)
}

_kvmi_libvirt_words() {
	COMPREPLY+=($(compgen -W "$1" -- "$cur"))
}

_kvmi_libvirt_files() {
	local IFS=$'\n'
	compopt -o filenames 2>/dev/null
	COMPREPLY+=($(compgen -f -- "$cur"))
}

# bash replaces what stands behind the last colon only.
_kvmi_libvirt_behind_colon() {
	local prefix=${cur%"${cur##*:}"}
	COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
}

_kvmi_libvirt_uris() {
	_kvmi_libvirt_words "@URIS@"
	_kvmi_libvirt_behind_colon
}

_kvmi_libvirt_profiles() {
	local file
	_kvmi_libvirt_words "@PROFILES@"
	for file in /etc/kvmi-libvirt/profiles.d/*.xml; do
		[[ -e $file ]] && file=${file##*/} && _kvmi_libvirt_words "${file%.xml}"
	done
}

_kvmi_libvirt_value() {
	case $1 in
	domain) _kvmi_libvirt_domains --all ;;
	running-domain) _kvmi_libvirt_domains ;;
	stopped-domain) _kvmi_libvirt_domains --inactive ;;
	file) _kvmi_libvirt_files ;;
	file-or-domain)
		_kvmi_libvirt_domains --all plain
		_kvmi_libvirt_files
		;;
	directory)
		local IFS=$'\n'
		compopt -o filenames 2>/dev/null
		COMPREPLY+=($(compgen -d -- "$cur"))
		;;
	uri) _kvmi_libvirt_words "@URIS@" ;;
	command) COMPREPLY+=($(compgen -c -- "$cur")) ;;
	socket) [[ unix:/run/kvmi/ == "$cur"* ]] && COMPREPLY+=(unix:/run/kvmi/) && compopt -o nospace ;;
	fault) _kvmi_libvirt_words "@FAULTS@" ;;
	right) _kvmi_libvirt_words "@RIGHTS@" ;;
	name)
		_kvmi_libvirt_words "@RIGHTS@"
		_kvmi_libvirt_profiles
		;;
	choices:*) _kvmi_libvirt_words "${1#*:}" ;;
	esac
}

_kvmi_libvirt() {
	local cur prev cword=-1 i word verb="" valued=""
	local -a words=()
	COMPREPLY=()
	# bash breaks words at colons and equals signs, which URIs and sockets hold.
	for ((i = 0; i <= COMP_CWORD; i++)); do
		word=${COMP_WORDS[i]}
		if ((cword > 0)) && [[ $word == [:=]* || ${words[cword]} == *[:=] ]]; then
			words[cword]+=$word
		else
			words+=("$word")
			cword=$((cword + 1))
		fi
	done
	cur=${words[cword]} prev=${words[cword - 1]}
	for ((i = 1; i < cword; i++)); do
		case ${words[i]} in
		-c | --connect) i=$((i + 1)) ;; # its URI follows
		-*) ;;
		*)
			verb=${words[i]}
			break
			;;
		esac
	done
	if [[ -z $verb ]]; then
		[[ $cur == --connect=* ]] && prev=--connect cur=${cur#*=}
		case $prev in
		-c | --connect) _kvmi_libvirt_uris ;;
		*) _kvmi_libvirt_words "@VERBS@ @GLOBAL@ -c --connect" ;;
		esac
		return
	fi

	# Which values this option takes, which options there are, what each place is.
	local options="" value="" places="" count=0 skip="" known
	[[ $cur == --*=* ]] && prev=${cur%%=*} && cur=${cur#*=}
	case $verb in
@CASES@
	*) return ;;
	esac
	if [[ -n $value ]]; then
		_kvmi_libvirt_value "$value"
		_kvmi_libvirt_behind_colon
		return
	fi
	if [[ $cur == -* ]]; then
		_kvmi_libvirt_words "$options"
		return
	fi
	for ((i += 1; i < cword; i++)); do
		if [[ -n $skip ]]; then
			skip=""
		elif [[ ${words[i]} == -* ]]; then
			for known in $valued; do
				[[ ${words[i]} == "$known" ]] && skip=yes
			done
		else
			count=$((count + 1))
		fi
	done
	local -a kinds
	IFS=';' read -ra kinds <<<"$places"
	local last=${#kinds[@]}
	((last == 0)) && return
	((count < last)) && last=$((count + 1))
	local kind=${kinds[last - 1]}
	((count >= ${#kinds[@]})) && [[ $kind != *+ ]] && return
	_kvmi_libvirt_value "${kind%+}"
}

complete -F _kvmi_libvirt kvmi-libvirt
