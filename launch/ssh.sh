#!/bin/bash
# Any hosts that are reached by ssh and share a folder: one process per host.
#
#     HOSTS="node1 node2" launch/ssh.sh --config=configs/storm_qwen2_7b.py:stage=sft --workdir=/shared/runs/sft
#
# Every host has this repository at the same path. Ctrl-C or SIGTERM here asks all processes to save and stop.
set -uo pipefail
read -ra hosts <<<"$HOSTS"
flags="--coordinator_address=${hosts[0]}:${PORT:-12355} --num_processes=${#hosts[@]}"

ask_to_stop() {
    for host in "${hosts[@]}"; do
        ssh "$host" "kill -TERM \$(cat /tmp/storm.$$.pid)"
    done
}
trap ask_to_stop INT TERM

for number in "${!hosts[@]}"; do
    (
        trap '' INT
        ssh "${hosts[$number]}" "cd $(printf %q "$PWD") && echo \$\$ >/tmp/storm.$$.pid &&
            exec python -u train.py $flags --process_id=$number $(printf '%q ' "$@")"
    ) &
    started+=($!)
done
status=0
for process in "${started[@]}"; do
    while true; do
        wait "$process"
        code=$?
        kill -0 "$process" 2>/dev/null || break  # a signal interrupts `wait`
    done
    ((code > status)) && status=$code
done
exit "$status"  # 75: stopped on request; the same command resumes
