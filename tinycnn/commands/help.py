"""The help texts of the program and its commands."""

TRAIN = """Train the network on CIFAR-10, and write what happened to logs/.

    python main.py                              80 epochs with the settings of config.py
    python main.py --recipe fast --seed 1       a named set of settings; every setting is a flag of the same name
    python main.py --data-dir ~/data            use, or download to, ~/data/cifar-10-batches-py
    python main.py --dataset folder --data-dir pictures     pictures/train/<class>/*, pictures/test/<class>/*
    python main.py --resume                     resume the newest unfinished run
    torchrun --standalone --nproc-per-node=gpu main.py      one run on all GPUs (docs/cluster.md)

Other commands (python main.py COMMAND --help):

    sweep --lr 0.01,0.05 --seeds 3              train a run for each combination of values and seeds, then compare
    compare                                     compare runs: what differs, and whether the difference is significant
    plot                                        draw the pictures of the newest finished run
    test                                        print its accuracy, class by class, and its calibration
    predict cat.jpg pictures/                   classify images
    export                                      write a file for ONNX Runtime, or for torch.export.load

Read logs/model_accuracy.log, a row per epoch, and logs/torch_summary.log, the network layer by layer.
"""
SWEEP = """Train a run for each combination of the values, and for each seed; then compare all runs.

    python main.py sweep --lr 0.01,0.05,0.1 --seeds 3 --epochs 8 --validation 5000
    python main.py sweep --one-at-a-time --flip-p 0.5,0 --dropout 0,0.1,0.2 --epochs 8 --validation 5000
    python main.py sweep --lr 0.01,0.05 --seeds 5 --on ray --gpus-per-run 0.25      several at a time (docs/cluster.md)

A setting with several values, separated by commas, varies; one with a single value has it in every run. With
--one-at-a-time, one run has the defaults, and each other value varies alone. Repeat the command after an interruption:
finished runs are skipped, an unfinished one is resumed. Choose settings by --validation, not on the test images.
"""
COMPARE = """Compare finished runs: what differs from the reference run, the accuracy, and whether the difference is
significant. Also writes experiments.csv and experiments.png to the log folder.

    python main.py compare                      all finished runs
    python main.py compare RUN RUN              these, and the reference run
"""
PLOT = """Draw the pictures of a finished run into its folder: accuracy.png, confusion_matrix.png, mistakes.png,
augmentation.png and receptive_field.png.

    python main.py plot                         the newest finished run
    python main.py plot RUN                     its --name, its folder's name under logs/runs, or a path
"""
TEST = """Print accuracy, loss, calibration and each class's accuracy of trained weights on the test images of their run.

    python main.py test                         the newest finished run
    python main.py test logs/reference          the reference run
    python main.py test RUN/best.safetensors --flip
"""
PREDICT = """Classify images with a trained network: PNG, JPEG, GIF, BMP, WEBP or TIFF files of up to 25 million
pixels, and folders of them.

    python main.py predict cat.jpg              with the newest finished run
    python main.py predict pictures/ --run logs/reference --json
"""
EXPORT = """Write a trained network as one file that runs without this program, into the folder of its run. Input: image, uint8,
N x 32 x 32 x 3, RGB. Output: logits. The file normalizes the images itself. It is loaded back and compared with the network
on the test images before it is written.

    python main.py export                       model.onnx, for ONNX Runtime
    python main.py export --to int8             model.int8.onnx, in 8 bits, calibrated on training images
    python main.py export --to torch RUN        model.pt2, for torch.export.load
"""
