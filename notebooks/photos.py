"""Data sets of torchvision, downloaded and written as the .npz that sgu.py reads.

    python notebooks/photos.py stl10 data       -> data/stl10.npz     (a download of 2.6 GB)
    python notebooks/photos.py celeba data      -> data/celeba.npz    (1.4 GB; it wants gdown)
    python notebooks/photos.py fashion data     -> data/fashion.npz   (30 MB; ten kinds of clothes)
    python notebooks/photos.py kmnist data      -> data/kmnist.npz    (20 MB; ten hiragana, o to wo)

Then: python sgu.py --dataset data/celeba.npz --forget Bangs
      python sgu.py --dataset data/fashion.npz --forget Sneaker --sde ve      (as for MNIST)
"""
import functools
import sys

import numpy as np
from torchvision import datasets

def face(portrait):
    """The centre square of 148 pixels of a portrait of 178x218, as 64x64 by a box filter."""
    return portrait.crop((15, 35, 163, 183)).resize((64, 64), 4)

def stl10(root):
    """The labelled images, 96x96, and their ten classes."""
    parts = [datasets.STL10(root, half, download=True) for half in ("train", "test")]
    images = [part.data.transpose(0, 2, 3, 1) for part in parts]         # (N, 96, 96, 3)
    return images, dict(labels=np.concatenate([part.labels for part in parts]),
                        class_names=parts[0].classes)

def celeba(root):
    """Faces, 64x64, with their 40 attributes."""
    parts = [datasets.CelebA(root, half, transform=face, download=True)
             for half in ("train", "valid", "test")]
    images = [np.stack([np.array(image) for image, _ in part]) for part in parts]
    names = parts[0].attr_names[:40]                                     # the header ends in ""
    return images, dict(attributes=np.concatenate([np.array(part.attr) for part in parts]),
                        attribute_names=names)

def like_mnist(kind, root):
    """Gray images, 28x28, and their ten classes."""
    parts = [kind(root, train=train, download=True) for train in (True, False)]
    return [part.data.numpy() for part in parts], dict(
        labels=np.concatenate([part.targets.numpy() for part in parts]),
        class_names=parts[0].classes)

SETS = dict(stl10=stl10, celeba=celeba,
            fashion=functools.partial(like_mnist, datasets.FashionMNIST),
            kmnist=functools.partial(like_mnist, datasets.KMNIST))

def main(name, root):
    """Write root/name.npz, in which split tells the sets apart that torchvision has."""
    images, arrays = SETS[name](root)
    split = np.repeat(np.arange(len(images)), [len(part) for part in images])
    np.savez(f"{root}/{name}.npz", images=np.concatenate(images), split=split, **arrays)
    print(f"{root}/{name}.npz: {len(split)} images")

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SETS:
        sys.exit(__doc__)
    main(*sys.argv[1:])
