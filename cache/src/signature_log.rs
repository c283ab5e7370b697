//! A memory of stat signatures: a flat append-only file, read whole on first use (a millisecond for ten thousand
//! entries, where opening a database costs more than a whole no-op run). Losing it, or any entry, costs a rehash.
//!
//! An entry says that the file which had this signature had this digest. It is written in one `write` of fixed size
//! to a file opened for appending, so two processes can write at once; a torn or damaged entry fails its check and is
//! skipped. Entries of another boot count only if the file's data were known to be on disk: see [`crate::sync`].

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustc_hash::FxHashMap;

use crate::digest::Digest;
use crate::signature::{SIGNATURE_BYTES, Signature};

/// What is remembered under a key: a blob's name, or the hash of a path in `out/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Remembered {
    pub digest: Digest,
    pub signature: Signature,
    /// Its data were synced, or read back from disk after the boot that wrote them.
    pub on_disk: bool,
}

pub(crate) struct SignatureLog {
    path: PathBuf,
    writable: bool,
    state: OnceLock<Mutex<State>>,
}

#[derive(Default)]
struct State {
    entries: FxHashMap<Digest, Remembered>,
    file: Option<File>,
    failed: bool,
}

/// key 32, digest 32, signature 40, boot 8, check 8.
const ENTRY_BYTES: usize = 32 + 32 + SIGNATURE_BYTES + 8 + 8;
const CHECKED_BYTES: usize = ENTRY_BYTES - 8;
/// Dead entries that are tolerated before the file is rewritten.
const SLACK: usize = 4096;

impl SignatureLog {
    pub fn new(path: PathBuf, writable: bool) -> SignatureLog {
        SignatureLog { path, writable, state: OnceLock::new() }
    }

    pub fn get(&self, key: &Digest) -> Option<Remembered> {
        self.state().entries.get(key).copied()
    }

    /// A failure to write is no error: the next use hashes again.
    pub fn put(&self, key: Digest, remembered: Remembered) {
        let mut state = self.state();
        if state.entries.insert(key, remembered) == Some(remembered) || !self.writable || state.failed {
            return;
        }
        if let Err(error) = state.append(&self.path, &encode(&key, &remembered)) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remember what was hashed; it will be hashed again");
            state.failed = true;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The map is whole between calls, so a panic elsewhere while it was held does no harm.
        self.state.get_or_init(|| Mutex::new(self.load())).lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self) -> State {
        let bytes = fs::read(&self.path).unwrap_or_default();
        let (whole, torn) = bytes.as_chunks::<ENTRY_BYTES>();
        let mut entries = FxHashMap::default();
        entries.reserve(whole.len());
        for (key, remembered) in whole.iter().filter_map(decode) {
            entries.insert(key, remembered);
        }
        // After a torn entry everything that is appended would be out of step.
        if self.writable && (!torn.is_empty() || whole.len() > 2 * entries.len() + SLACK) {
            rewrite(&self.path, &entries);
        }
        State { entries, ..State::default() }
    }
}

impl State {
    fn append(&mut self, path: &Path, entry: &[u8]) -> std::io::Result<()> {
        if self.file.is_none() {
            let mut options = OpenOptions::new();
            options.append(true).create(true);
            let file = options.open(path).or_else(|error| {
                fs::create_dir_all(path.parent().ok_or(error)?)?;
                options.open(path)
            })?;
            self.file = Some(file);
        }
        match &mut self.file {
            Some(file) => file.write_all(entry),
            None => Ok(()),
        }
    }
}

/// Entries that another process appends meanwhile are lost, which costs it a rehash.
fn rewrite(path: &Path, entries: &FxHashMap<Digest, Remembered>) {
    let replace = || -> std::io::Result<()> {
        let folder = path.parent().ok_or(std::io::ErrorKind::NotFound)?;
        let mut staged = tempfile::NamedTempFile::new_in(folder)?;
        let bytes: Vec<u8> = entries.iter().flat_map(|(key, remembered)| encode(key, remembered)).collect();
        staged.write_all(&bytes)?;
        staged.persist(path)?;
        Ok(())
    };
    if let Err(error) = replace() {
        tracing::warn!(path = %path.display(), %error, "cannot compact");
        let _ = fs::remove_file(path);
    }
}

fn encode(key: &Digest, remembered: &Remembered) -> [u8; ENTRY_BYTES] {
    let boot = if remembered.on_disk { 0 } else { this_boot() };
    let mut entry = [0; ENTRY_BYTES];
    let parts = [
        key.as_bytes().as_slice(),
        remembered.digest.as_bytes(),
        &remembered.signature.to_bytes(),
        &boot.to_le_bytes(),
    ];
    let mut rest = entry.as_mut_slice();
    for part in parts {
        let (place, after) = rest.split_at_mut(part.len());
        place.copy_from_slice(part);
        rest = after;
    }
    let check = check_of(&entry);
    entry[CHECKED_BYTES..].copy_from_slice(&check);
    entry
}

fn decode(entry: &[u8; ENTRY_BYTES]) -> Option<(Digest, Remembered)> {
    let (key, rest) = entry.split_first_chunk::<32>()?;
    let (digest, rest) = rest.split_first_chunk::<32>()?;
    let (signature, rest) = rest.split_first_chunk::<SIGNATURE_BYTES>()?;
    let (boot, check) = rest.split_first_chunk::<8>()?;
    let boot = u64::from_le_bytes(*boot);
    if check != check_of(entry) || (boot != 0 && boot != this_boot()) {
        return None;
    }
    let signature = Signature::from_bytes(signature);
    Some((Digest::from_bytes(*key), Remembered { digest: Digest::from_bytes(*digest), signature, on_disk: boot == 0 }))
}

fn check_of(entry: &[u8; ENTRY_BYTES]) -> [u8; 8] {
    let hash = blake3::hash(&entry[..CHECKED_BYTES]);
    let mut check = [0; 8];
    check.copy_from_slice(&hash.as_bytes()[..8]);
    check
}

/// A number for the present boot, never 0. Where the kernel gives none it is made up, and nothing outlives the process.
fn this_boot() -> u64 {
    static BOOT: OnceLock<u64> = OnceLock::new();
    *BOOT.get_or_init(|| {
        let mut id = crate::process::boot_id().to_owned();
        if id.is_empty() {
            id = format!("{} {}", std::process::id(), crate::signature::now());
        }
        let hash = blake3::hash(id.as_bytes());
        hash.as_bytes().first_chunk::<8>().map_or(1, |bytes| u64::from_le_bytes(*bytes)).max(1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remembered(size: u64) -> Remembered {
        let signature = Signature { device: 1, inode: 2, size, mtime: 3, ctime: 4 };
        Remembered { digest: Digest::of(&size.to_le_bytes()), signature, on_disk: size.is_multiple_of(2) }
    }

    #[test]
    fn entries_survive_and_the_last_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host/blobs.log");
        let key = Digest::of(b"key");
        let log = SignatureLog::new(path.clone(), true);
        log.put(key, remembered(1));
        log.put(key, remembered(2));
        log.put(Digest::of(b"other"), remembered(3));
        let again = SignatureLog::new(path, true);
        assert_eq!(again.get(&key), Some(remembered(2)));
        assert_eq!(again.get(&Digest::of(b"other")), Some(remembered(3)));
    }

    #[test]
    fn damage_costs_the_damaged_entry_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blobs.log");
        let keys: Vec<Digest> = (0..3u8).map(|i| Digest::of(&[i])).collect();
        let log = SignatureLog::new(path.clone(), true);
        keys.iter().for_each(|key| log.put(*key, remembered(2)));
        let mut bytes = fs::read(&path).unwrap();
        bytes[ENTRY_BYTES + 70] ^= 1;
        bytes.extend_from_slice(b"torn");
        fs::write(&path, &bytes).unwrap();
        let log = SignatureLog::new(path.clone(), true);
        assert_eq!(keys.iter().map(|key| log.get(key).is_some()).collect::<Vec<_>>(), [true, false, true]);
        log.put(keys[1], remembered(4));
        let log = SignatureLog::new(path, true);
        assert!(keys.iter().all(|key| log.get(key).is_some()), "entries after a torn one are readable");
    }

    #[test]
    fn an_entry_of_another_boot_counts_only_if_it_was_on_disk() {
        let mut entry = encode(&Digest::of(b"k"), &remembered(1));
        assert!(decode(&entry).is_some());
        entry[CHECKED_BYTES - 8] ^= 1;
        let check = check_of(&entry);
        entry[CHECKED_BYTES..].copy_from_slice(&check);
        assert!(decode(&entry).is_none());
    }
}
