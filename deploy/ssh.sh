#!/bin/bash
# The same training on several machines that ssh reaches; data, run folder and Python lie where all of them see them:
#   HOSTS="node1 node2" PYTHON=/shared/venv/bin/python deploy/ssh.sh -p preset base -p data /shared/audio -p run_dir /shared/run -p processes 8
# The first host keeps the meeting point (PORT, 29500). Ctrl-C or SIGTERM stops all with a checkpoint: exit code 75.
set -u
read -ra hosts <<<"${HOSTS:?name the machines, for instance HOSTS=\"node1 node2\"}"
job="aasp-$(date +%s)-$$"
words=$(printf ' %q' -m aasp_nb.train --nodes "${#hosts[@]}" --endpoint "${hosts[0]}:${PORT:-29500}" --name "$job" "$@")
pids=()
for host in "${hosts[@]}"; do
    ssh "$host" "echo \$\$ > ~/.$job-$host.pid; cd $(printf %q "$PWD") 2>/dev/null; exec ${PYTHON:-python}$words" &
    pids+=($!)
done
stop() { for host in "${hosts[@]}"; do ssh "$host" "kill -TERM \$(cat ~/.$job-$host.pid)"; done; }
trap stop INT TERM
code=0
for pid in "${pids[@]}"; do
    while :; do  # wait is cut short by a signal
        wait "$pid"; ended=$?
        [ $ended -le 128 ] && break
        kill -0 "$pid" 2>/dev/null || { wait "$pid"; ended=$?; break; }
    done
    [ $ended -gt $code ] && code=$ended
done
for host in "${hosts[@]}"; do ssh "$host" "rm -f ~/.$job-$host.pid"; done
exit $code
