//! The named steps of publication, at each of which a test may kill the process. Outside tests they are nothing.

/// A point between two effects on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Sealed,
    Hashed,
    BlobSynced,
    BlobPlaced,
    BlobRemembered,
    FolderFilesPlaced,
    ManifestStaged,
    FolderPlaced,
    RecordStaged,
    RecordSynced,
    RecordPlaced,
}

#[cfg(not(test))]
#[inline(always)]
pub(crate) fn reach(_step: Step) {}

/// Aborts the process, as `kill -9` would, at the step and the visit that the environment names (`Step:visit`).
#[cfg(test)]
pub(crate) fn reach(step: Step) {
    use std::sync::Mutex;
    static VISITS: Mutex<Vec<Step>> = Mutex::new(Vec::new());
    let Ok(wanted) = std::env::var("GRLM_CACHE_TEST_CRASH_AT") else { return };
    let Some((name, visit)) = wanted.split_once(':') else { return };
    let Ok(mut visits) = VISITS.lock() else { return };
    visits.push(step);
    let count = visits.iter().filter(|visited| **visited == step).count();
    if name == format!("{step:?}") && visit == count.to_string() {
        std::process::abort();
    }
}
