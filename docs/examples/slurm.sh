#!/bin/bash
# Two nodes with four GPUs each, one process a GPU; a job that is requeued goes on where it was.
# sbatch docs/examples/slurm.sh configs/experiment/oc20_2m_escn_l4m2.yaml
#SBATCH --job-name=atomeq
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@120
set -euo pipefail

experiment=${1:?give an experiment: sbatch docs/examples/slurm.sh configs/experiment/NAME.yaml}
export OMP_NUM_THREADS=1

# Lightning reads rank and address from SLURM; SIGUSR1, two minutes before the end, makes it save and
# ask for the job again. `last` is the last checkpoint of the run's folder, or a new start.
srun atomeq fit -c "$experiment" \
  --trainer.num_nodes "$SLURM_NNODES" \
  --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.strategy ddp \
  --checkpoint.every_n_train_steps 1000 --checkpoint.monitor null \
  --ckpt_path last
