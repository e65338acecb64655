"""Trains a scikit-learn classifier on the encoder's features: python examples/extract_features.py [FOLDER] [-m MODEL]

FOLDER holds one subfolder a class. Without it, 32 bundled pictures are used, their class in the file name.
"""

import argparse
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bigbigan import load
from bigbigan.images import asset_images, list_images

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path)
parser.add_argument("-m", "--model", help="name, folder or Hub repository; default: the embedded model")
args = parser.parse_args()

paths = list_images(args.folder) if args.folder else asset_images()
labels = [path.parent.name if args.folder else path.stem.split("_")[1] for path in paths]
features = load(args.model, parts=("encoder",)).encode(paths).bn_crelu_feat.numpy()  # [N, 2 F]
classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
folds = KFold(8, shuffle=True, random_state=0)
accuracy = cross_val_score(classifier, features, labels, cv=folds).mean()
print(f"{len(paths)} pictures, {len(set(labels))} classes: {accuracy:.1%} cross-validated accuracy")
