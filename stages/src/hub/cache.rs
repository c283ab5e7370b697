//! The cache of model files on disk, in the layout of `huggingface_hub`, so that all programs share it: blobs by
//! digest, and a folder of links for every commit.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use sha1::Digest as _;

use super::client::{Check, Client, RemoteFile};
use crate::StageError;

/// One repository's folder in the cache.
pub struct Repository {
    root: PathBuf,
    name: String,
}

impl Repository {
    pub fn new(cache: &Path, repository: &str) -> Self {
        let root = cache.join(format!("models--{}", repository.replace('/', "--")));
        Self { root, name: repository.to_owned() }
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The commit that a revision stood for when it was last asked.
    pub fn known_commit(&self, revision: &str) -> Option<String> {
        let commit = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|c| super::is_commit(c))
    }

    pub fn remember_commit(&self, revision: &str, commit: &str) -> Result<(), StageError> {
        write(&self.root.join("refs").join(revision), commit.as_bytes())
    }

    /// Whether everything that is wanted of a commit was fetched by this program.
    pub fn is_complete(&self, commit: &str) -> bool {
        self.mark(commit).exists()
    }

    pub fn mark_complete(&self, commit: &str) -> Result<(), StageError> {
        write(&self.mark(commit), b"")
    }

    fn mark(&self, commit: &str) -> PathBuf {
        self.root.join(".grlm").join(commit)
    }

    /// Brings a file into a commit's folder, from the blobs or from the hub.
    pub fn place(
        &self,
        commit: &str,
        file: &RemoteFile,
        client: &Client,
        progress: &mut dyn FnMut(u64) -> Result<(), StageError>,
    ) -> Result<(), StageError> {
        let link = self.snapshot(commit).join(&file.path);
        if fs::metadata(&link).is_ok_and(|m| m.len() == file.size) {
            return Ok(());
        }
        let name = match file.check() {
            Check::Sha256(digest) | Check::GitBlob(digest) if digest.bytes().all(|b| b.is_ascii_hexdigit()) => {
                digest.to_owned()
            }
            _ => format!("{commit}-{}", file.path.replace('/', "-")),
        };
        let blob = self.root.join("blobs").join(&name);
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |e: io::Error| StageError::io(action, path, e)
        };
        create_parent(&blob)?;
        // Two workers may want it at once: the second waits, and finds it there.
        let lock = blob.with_extension("lock");
        let lock_file = File::create(&lock).map_err(io("create", &lock))?;
        lock_file.lock().map_err(io("lock", &lock))?;
        if !blob.exists() {
            let part = blob.with_extension("incomplete");
            for round in 0.. {
                client.download(&self.name, commit, file, &part, progress)?;
                match found(&part, &file.check()).map_err(io("read", &part))? {
                    None => break,
                    Some(_) if round == 0 => {
                        // What was there before may have been the wrong half.
                        fs::remove_file(&part).map_err(io("remove", &part))?;
                    }
                    Some(digest) => {
                        let _ = fs::remove_file(&part);
                        let message = format!(
                            "`{}` of `{}` is not what the hub says: its digest is {digest}",
                            file.path, self.name
                        );
                        return Err(StageError::Network {
                            message,
                            help: Some("a proxy or mirror may be changing it".into()),
                        });
                    }
                }
            }
            fs::rename(&part, &blob).map_err(io("rename", &part))?;
        }
        drop(lock_file);
        let _ = fs::remove_file(&lock);
        create_parent(&link)?;
        let up = "../".repeat(2 + file.path.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{name}"));
        // Made aside and moved: another worker may just be opening the link that it has made.
        let folder = link.parent().unwrap_or(&self.root);
        let staged = tempfile::Builder::new().prefix(".grlm-").tempdir_in(folder).map_err(io("write in", folder))?;
        let aside = staged.path().join("link");
        let made = std::os::unix::fs::symlink(&target, &aside);
        // File systems without links.
        made.or_else(|_| fs::copy(&blob, &aside).map(drop)).map_err(io("write", &link))?;
        fs::rename(&aside, &link).map_err(io("write", &link))
    }
}

/// The digest of a file where it is not the one wanted.
fn found(path: &Path, check: &Check) -> io::Result<Option<String>> {
    let mut file = File::open(path)?;
    let (found, wanted) = match check {
        Check::Sha256(wanted) => {
            let mut hasher = sha2::Sha256::new();
            io::copy(&mut file, &mut hasher)?;
            (hex(&hasher.finalize()), wanted)
        }
        Check::GitBlob(wanted) => {
            let mut hasher = sha1::Sha1::new();
            hasher.update(format!("blob {}\0", file.metadata()?.len()));
            io::copy(&mut file, &mut hasher)?;
            (hex(&hasher.finalize()), wanted)
        }
        Check::Nothing => return Ok(None),
    };
    Ok((!found.eq_ignore_ascii_case(wanted)).then_some(found))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn create_parent(path: &Path) -> Result<(), StageError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).map_err(|e| StageError::io("create", parent, e))
}

fn write(path: &Path, content: &[u8]) -> Result<(), StageError> {
    create_parent(path)?;
    let temporary = path.with_extension(format!("{}", std::process::id()));
    fs::write(&temporary, content)
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(|e| StageError::io("write", path, e))
}
