//! What an attempt wrote: checked, and taken into the store. What is wrong with it is the stage's failure, not the
//! store's.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use grlm_cache::{Content, Store, StoreError};

use super::{attempt::JobOutput, content::Odd};

/// Why the outputs of an attempt cannot be its result.
#[derive(Debug, PartialEq, Eq)]
pub struct WrongOutput {
    pub message: String,
    pub help: Option<String>,
}

/// Checks the outputs, by port at `paths`, and moves them into the store.
///
/// # Errors
/// The store cannot take them for a reason of its own.
pub fn take(
    store: &Store,
    outputs: &[JobOutput],
    paths: &BTreeMap<String, PathBuf>,
) -> Result<Result<BTreeMap<String, Content>, WrongOutput>, StoreError> {
    for output in outputs {
        if let Some(problem) = problem(output, &paths[&output.port]) {
            let message = format!("output `{}` ({}) {problem}", output.port, output.file);
            return Ok(Err(WrongOutput { message, help: None }));
        }
    }
    let mut taken = BTreeMap::new();
    for output in outputs {
        let path = &paths[&output.port];
        match store.ingest(path) {
            Ok(content) => taken.insert(output.port.clone(), content),
            Err(error) => return Odd::below(path, &error).map(|odd| Err(told(output, path, odd))).ok_or(error),
        };
    }
    Ok(Ok(taken))
}

fn problem(output: &JobOutput, path: &Path) -> Option<String> {
    Some(match fs::metadata(path) {
        Err(_) => "was not written".to_owned(),
        Ok(m) if m.is_dir() => match fs::read_dir(path).map(|mut d| d.next().is_none()) {
            Ok(true) if !output.may_be_empty => "is an empty folder".into(),
            _ => return None,
        },
        // The store says what it is instead.
        Ok(m) if !m.is_file() => return None,
        Ok(m) if m.len() == 0 && !output.may_be_empty => "is empty".into(),
        Ok(m) if m.len() == 0 => return None,
        Ok(_) => match grlm_stages::artifact::check(output.artifact, path, output.may_be_empty) {
            Ok(()) => return None,
            Err(error) => {
                // The attempt's folder is gone when this is read.
                let error = error.to_string().replace(&path.display().to_string(), &output.file);
                format!("is not what it should be: {error}")
            }
        },
    })
}

/// Names the place as the pipeline does.
fn told(output: &JobOutput, path: &Path, odd: Odd) -> WrongOutput {
    let below = odd.path.strip_prefix(path).unwrap_or(Path::new(""));
    let place = if below.as_os_str().is_empty() { "it".to_owned() } else { format!("`{}`", below.display()) };
    let message = format!("output `{}` ({}): {place} {}", output.port, output.file, odd.what);
    WrongOutput { message, help: odd.help }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{ffi::OsStrExt, fs::symlink};

    use grlm_cache::Access;
    use grlm_stages::Artifact;

    use super::*;

    /// What is said of an output folder that was filled so.
    fn said(fill: impl FnOnce(&Path)) -> String {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), Access::Write).unwrap();
        let path = folder.path().join("f");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("plain"), "x").unwrap();
        fill(&path);
        let output = JobOutput { port: "o".into(), file: "f".into(), artifact: Artifact::Any, may_be_empty: false };
        let taken = take(&store, &[output], &BTreeMap::from([("o".to_owned(), path)])).unwrap();
        taken.expect_err("it cannot be stored").message
    }

    #[test]
    fn what_cannot_be_stored_is_told_with_its_place() {
        let dangling = said(|path| symlink("nowhere", path.join("link")).unwrap());
        assert_eq!(dangling, "output `o` (f): `link` is a link that leads nowhere");
        let back = said(|path| symlink(".", path.join("link")).unwrap());
        assert_eq!(back, "output `o` (f): `link` is a link that leads back to a folder that holds it");
        let own = said(|path| symlink("link", path.join("link")).unwrap());
        assert_eq!(own, "output `o` (f): `link` is a link that leads to itself");
        let device = said(|path| symlink("/dev/null", path.join("link")).unwrap());
        assert_eq!(device, "output `o` (f): `link` is a device");
        let named = said(|path| fs::write(path.join(std::ffi::OsStr::from_bytes(b"\xff")), "x").unwrap());
        assert!(named.starts_with("output `o` (f): ") && named.ends_with(" has a name that is not UTF-8"), "{named}");
    }

    #[test]
    fn an_output_of_another_form_is_told_by_its_own_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rankings.jsonl");
        fs::write(&path, "no ranking\n").unwrap();
        let output = JobOutput {
            port: "out".into(),
            file: "rankings.jsonl".into(),
            artifact: Artifact::Rankings,
            may_be_empty: false,
        };
        let said = problem(&output, &path).unwrap();
        assert!(said.contains("rankings.jsonl") && !said.contains(&*folder.path().to_string_lossy()), "{said}");
    }

    #[test]
    fn an_output_that_is_a_device_itself_is_told_too() {
        let device = said(|path| {
            fs::remove_dir_all(path).unwrap();
            symlink("/dev/null", path).unwrap();
        });
        assert_eq!(device, "output `o` (f): it is a device");
    }
}
