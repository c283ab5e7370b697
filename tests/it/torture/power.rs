//! What a power cut leaves: of the files that came or changed since the cut's run began, only what was synced is sure.
//! Everything else is there, empty, cut, zeroed or gone, as the dice say.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use super::Dice;

/// Files with their inode, as they are before the run: those are on disk.
pub fn snapshot(store: &Path) -> HashMap<PathBuf, u64> {
    let mut files = HashMap::new();
    collect(store, &mut files);
    files
}

fn collect(folder: &Path, files: &mut HashMap<PathBuf, u64>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            collect(&entry.path(), files);
        } else if metadata.is_file() {
            files.insert(entry.path(), metadata.ino());
        }
    }
}

/// Takes from the store what the disk did not have to keep. `synced` lists paths of files and folders; the store's own
/// path stands for everything that was there by then.
pub fn cut(store: &Path, before: &HashMap<PathBuf, u64>, synced: &str, dice: &mut Dice) {
    let root = fs::canonicalize(store).unwrap_or_else(|_| store.to_path_buf());
    let synced: HashSet<PathBuf> =
        synced.lines().map(|line| fs::canonicalize(line).unwrap_or_else(|_| PathBuf::from(line))).collect();
    if synced.contains(&root) {
        return;
    }
    let mut now: Vec<(PathBuf, u64)> = snapshot(&root).into_iter().collect();
    now.sort();
    let before: HashSet<(PathBuf, u64)> =
        before.iter().map(|(path, inode)| (root.join(path.strip_prefix(store).unwrap_or(path)), *inode)).collect();
    for (path, inode) in now {
        if before.contains(&(path.clone(), inode)) {
            continue;
        }
        let named = path.parent().is_some_and(|folder| synced.contains(folder));
        match (synced.contains(&path), named) {
            (true, true) => {}
            // Its data are there; its name may not be.
            (true, false) => {
                if dice.roll(2) == 0 {
                    let _ = fs::remove_file(&path);
                }
            }
            (false, _) => lose(&path, dice),
        }
    }
}

fn lose(path: &Path, dice: &mut Dice) {
    let length = fs::metadata(path).map_or(0, |metadata| metadata.len());
    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o644));
    let resize = |to: u64| fs::File::options().write(true).open(path).and_then(|file| file.set_len(to));
    match dice.roll(5) {
        0 => {}
        1 => drop(fs::remove_file(path)),
        2 => drop(resize(0)),
        3 => drop(resize(length / 2)),
        // The length was recorded, the data were not.
        _ => drop(resize(0).and_then(|()| resize(length))),
    }
    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o444));
}

/// Flips one bit of one file of the store, and dates it as it was.
pub fn flip(store: &Path, dice: &mut Dice) -> Option<PathBuf> {
    let mut files: Vec<PathBuf> = snapshot(store)
        .into_keys()
        .filter(|path| {
            ["blobs", "actions", "index", "latest", "measured", "rows"].iter().any(|f| path.starts_with(store.join(f)))
        })
        .filter(|path| fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0))
        .collect();
    files.sort();
    let path = dice.pick(&files)?.clone();
    let times = fs::metadata(&path).and_then(|metadata| metadata.modified()).ok()?;
    let mut bytes = fs::read(&path).ok()?;
    let place = dice.roll(bytes.len());
    bytes[place] ^= 1 << dice.roll(8);
    let mode = fs::metadata(&path).ok()?.permissions();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).ok()?;
    fs::write(&path, bytes).ok()?;
    fs::File::options().write(true).open(&path).and_then(|file| file.set_modified(times)).ok()?;
    fs::set_permissions(&path, mode).ok()?;
    Some(path)
}
