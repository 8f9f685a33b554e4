#!/usr/bin/env bash
# Old formats and those of small groups: settings of the new decode kernels, then decode attention,
# gather and seal of all, one table. About two minutes on an H200. Usage: groups.sh [FOLDER]
set -euo pipefail
out=${1:-outputs/groups}
new=int4g,int3g,k4v2g,k3v2g,int2g
python -m kvlab experiment=none job=tune "job.formats=[$new]" "job.block_sizes=[128]" \
    hydra.run.dir="$out/tune"
python -m kvlab experiment=kernel_roofline hydra.run.dir="$out/roofline" job.peers=false \
    job.prefill=null "job.decode=[[1,4096],[1,200000],[16,32768]]" \
    'job.formats={bf16:[64],fp8:[128],int8:[128],int4:[128],k4v2:[128],int3:[128],int2:[128],int4g:[128],int3g:[128],k4v2g:[128],k3v2g:[128],int2g:[128]}'
python - "$out" <<'END'
import json, sys
for part, wanted in (("tune", None), ("roofline", ("decode_attention_us", "gather_us", "seal_us", "seal_open_us"))):
    best = {}
    for line in open(f"{sys.argv[1]}/{part}/measurements.jsonl"):
        row = json.loads(line)
        if wanted is None:
            key = row["params"].get("format")
            best.setdefault(key, []).append((row["value"], row["params"].get("setting")))
        elif row["name"] in wanted:
            p = row["params"]
            print(f"{row['name']:20} {p['format']:6} block {p['block_size']:<4} batch {p.get('batch', '-')!s:3} "
                  f"tokens {p.get('tokens', '-')!s:7} {row['value']:9.1f} us")
    for key, times in best.items():
        standing = [us for us, setting in times if setting is None]
        print(f"tune {key}: standing {standing}, fastest {sorted(times, key=lambda t: t[0])[:4]}")
END
