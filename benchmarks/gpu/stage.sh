#!/usr/bin/env bash
# Puts a made kit in place in a checkout, and makes room for it in what travels with a call.
#   stage.sh CHECKOUT [MADE_KIT]     before the first call   (MADE_KIT: make_kit.py's --out, default CHECKOUT/.gpukit)
#   stage.sh CHECKOUT --undo         after the last one: the adapters' weights come back from git
# The adapters' weights (39 MB, tracked) are cut to nothing in the working tree only: 64 MiB a call is for all of it. The
# shipped adapter travels in the parts, and unpack.py puts it back on the device in every call. Nothing is committed.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"; repo="$(cd "$1" && pwd)"; made="${2:-$repo/.gpukit}"
cd "$repo"
if [ "$made" = --undo ]; then
  git checkout -- 'configs/adapters/*/adapter_model.safetensors'
  git status --short | head
  exit 0
fi
if [ "$made" != "$repo/.gpukit" ]; then rm -rf .gpukit; cp -r "$made" .gpukit; fi
cp "$here"/*.py "$here"/*.sh .gpukit/kit/      # the newest scripts, the same blobs
git rev-parse HEAD > .gpukit/kit/commit.txt
for file in configs/adapters/*/adapter_model.safetensors; do
  [ ! -s "$file" ] || git diff --quiet HEAD -- "$file" || { echo "$file has changes that --undo would lose"; exit 1; }
  : > "$file"
done
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c %s 2>/dev/null | awk '{s += $1} END {print s}')
for part in .gpukit/p*; do
  size=$(( tree + $(du -sb .gpukit/kit | cut -f1) + $(du -sb "$part" | cut -f1) ))
  echo "$part: $(( size / 1048576 )) MiB with the tree and .gpukit/kit, limit 64"
done
