#!/usr/bin/env bash
# A base image for a machine without a container registry: Debian bookworm by debootstrap, about a minute.
#
#     containers/local-base.sh [NAME]        (root; needs debootstrap and a running docker daemon; DOCKER names the client)
#
# It trusts the certificate authorities that this machine trusts, because its network may be intercepted. That belongs
# in a base for this machine only: never push an image that stands on it.
set -euo pipefail

NAME=${1:-assay-local-base:bookworm}
DOCKER=${DOCKER:-docker}
ROOT=$(mktemp -d "${TMPDIR:-/tmp}/assay-base.XXXXXX")
trap 'rm -rf "$ROOT" "$ROOT.log"' EXIT

debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$ROOT" >"$ROOT.log" 2>&1 ||
    { tail -n 20 "$ROOT.log" >&2; echo "local-base: debootstrap failed; the end of its log stands above" >&2; exit 1; }
chmod 755 "$ROOT"  # mktemp's 700 would lock every user but root out of the image

mkdir -p "$ROOT/usr/local/share/ca-certificates"
find /usr/local/share/ca-certificates -name '*.crt' -exec cp {} "$ROOT/usr/local/share/ca-certificates/" \; 2>/dev/null || true
TMPDIR=/tmp chroot "$ROOT" update-ca-certificates >/dev/null 2>>"$ROOT.log" || { cat "$ROOT.log" >&2; exit 1; }

# `python` as in the official image; documentation, locales and package lists are for people.
ln -s python3 "$ROOT/usr/bin/python"
rm -rf "$ROOT"/var/cache/apt/* "$ROOT"/var/lib/apt/lists/* "$ROOT"/var/log/* \
    "$ROOT"/usr/share/{doc,man,info,locale}/* "$ROOT/etc/resolv.conf" "$ROOT/etc/hostname"

tar -C "$ROOT" --numeric-owner -cf - . | "$DOCKER" import \
    -c 'ENV LANG=C.UTF-8' \
    -c 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
    -c 'LABEL assay.local-base=true' \
    -c 'CMD ["python3"]' \
    - "$NAME" >/dev/null
echo "$NAME"
