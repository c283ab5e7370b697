//! What a large folder looked like when it was last hashed: one flat file instead of a hundred thousand index look-ups.
//!
//! Entries whose files were too young to be trusted are left out, so they are hashed again. A snapshot that fails its
//! checksum, or is of another format, is no snapshot.

use std::fs;
use std::io::Write;
use std::path::Path;

use blake3::Hasher;

use crate::digest::Digest;
use crate::signature::{SIGNATURE_BYTES, Signature};

/// Sorted by path bytes, as a walk is.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct FolderSnapshot {
    pub entries: Vec<SnapshotEntry>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SnapshotEntry {
    pub path: String,
    pub signature: Signature,
    pub digest: Digest,
}

const MAGIC: &[u8; 16] = b"grlm-snapshot 1\n";

impl FolderSnapshot {
    pub fn load(path: &Path) -> Option<FolderSnapshot> {
        let bytes = fs::read(path).ok()?;
        let (body, checksum) = bytes.split_last_chunk::<32>()?;
        if checksum != Hasher::new().update_rayon(body).finalize().as_bytes() {
            return None;
        }
        let mut rest = body.strip_prefix(MAGIC.as_slice())?;
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let (signature, after) = rest.split_first_chunk::<SIGNATURE_BYTES>()?;
            let (digest, after) = after.split_first_chunk::<32>()?;
            let (length, after) = after.split_first_chunk::<4>()?;
            let (name, after) = after.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
            entries.push(SnapshotEntry {
                path: std::str::from_utf8(name).ok()?.to_owned(),
                signature: Signature::from_bytes(signature),
                digest: Digest::from_bytes(*digest),
            });
            rest = after;
        }
        Some(FolderSnapshot { entries })
    }

    /// Replaces the snapshot at `path` atomically.
    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        let mut bytes = Vec::with_capacity(64 + self.entries.len() * 128);
        bytes.extend_from_slice(MAGIC);
        for entry in &self.entries {
            let length = u32::try_from(entry.path.len()).map_err(std::io::Error::other)?;
            bytes.extend_from_slice(&entry.signature.to_bytes());
            bytes.extend_from_slice(entry.digest.as_bytes());
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(entry.path.as_bytes());
        }
        let checksum = Hasher::new().update_rayon(&bytes).finalize();
        bytes.extend_from_slice(checksum.as_bytes());
        let folder = path.parent().ok_or(std::io::ErrorKind::NotFound)?;
        fs::create_dir_all(folder)?;
        let mut staged = tempfile::NamedTempFile::new_in(folder)?;
        staged.write_all(&bytes)?;
        staged.persist(path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_and_refuses_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folders/s");
        let signature = Signature { device: 1, inode: 2, size: 3, mtime: 4, ctime: 5 };
        let entries = ["", "a", "b/ü"]
            .map(|path| SnapshotEntry { path: path.into(), signature, digest: Digest::of(path.as_bytes()) })
            .to_vec();
        let snapshot = FolderSnapshot { entries };
        snapshot.save(&path).unwrap();
        assert_eq!(FolderSnapshot::load(&path).as_ref(), Some(&snapshot));
        let whole = fs::read(&path).unwrap();
        for place in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[place] ^= 1;
            fs::write(&path, &flipped).unwrap();
            assert_eq!(FolderSnapshot::load(&path), None, "flipped at {place}");
            fs::write(&path, &whole[..place]).unwrap();
            assert_eq!(FolderSnapshot::load(&path), None, "cut at {place}");
        }
    }
}
