//! Pretrained models that stages load themselves, with nothing left open: a folder by the digest of its files, a
//! repository of the hub by its commit.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use grlm_cache::{Store, StoreError};
use grlm_stages::hub::{Hub, ModelName, PinnedModel};

use super::{
    decide::FilesError,
    work::{Permission, Work},
};
use crate::pipeline::Stage;

/// How long the hub may take before its cache is asked.
const PATIENCE: Duration = Duration::from_secs(10);

/// Models by the name that a parameter gives.
#[derive(Debug, Default)]
pub struct Models(HashMap<String, Pinned>);

/// A model, and what of it enters a key.
#[derive(Debug, Clone)]
pub struct Pinned {
    pub model: PinnedModel,
    pub identity: String,
}

impl Models {
    /// Pins the models of every node that may run (or be used). A repository about which nothing can be learned is no
    /// error here: a plan is of use without a network.
    ///
    /// # Errors
    /// A folder cannot be read; the hub was asked, and has no such model for us.
    pub fn pin(store: &Store, work: &Work) -> Result<Self, FilesError> {
        let named: BTreeSet<String> = work
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| node.permission != Permission::Leave)
            .flat_map(|(id, _)| uses(work.stage(id)).into_values())
            .collect();
        if named.is_empty() {
            return Ok(Self::default());
        }
        let hub = Hub::from_env(PATIENCE);
        let pin = |name: String| {
            let pinned = pin(store, &hub, &name)?;
            Ok((name, pinned))
        };
        let models = named.into_iter().map(pin).collect::<Result<_, StoreError>>().map(Self)?;
        if hub.is_on() {
            models.check(work)?;
        }
        Ok(models)
    }

    /// Whether every model that is asked for is there, as far as is known.
    ///
    /// # Errors
    /// A model that is not there, so that its stage would fail however often it is tried.
    pub fn check(&self, work: &Work) -> Result<(), FilesError> {
        let asked_for = work.nodes.iter().filter(|node| node.permission != Permission::Leave);
        for node in asked_for {
            for (parameter, pinned) in self.of(work.stage_of(node)) {
                if let PinnedModel::Unknown { message, help, wrong: true } = pinned.model {
                    return Err(FilesError::Model { stage: node.label.clone(), parameter, message, help });
                }
            }
        }
        Ok(())
    }

    /// The models of a stage, by the parameter that names each.
    pub fn of(&self, stage: &Stage) -> BTreeMap<String, Pinned> {
        uses(stage).into_iter().filter_map(|(place, name)| Some((place, self.0.get(&name)?.clone()))).collect()
    }
}

/// The models that a stage names, by the parameter that names each.
pub(super) fn uses(stage: &Stage) -> BTreeMap<String, String> {
    stage.kind.models(&stage.params).unwrap_or_default()
}

fn pin(store: &Store, hub: &Hub, name: &str) -> Result<Pinned, StoreError> {
    let parsed = ModelName::parse(name);
    if let Ok(ModelName::Folder(folder)) = &parsed {
        let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.clone());
        let identity = store.digest(&folder)?.digest.hex();
        return Ok(Pinned { model: PinnedModel::Folder(folder), identity });
    }
    let model = match parsed.map(|name| hub.pin(&name)) {
        Ok(Ok(model)) => model,
        Ok(Err(error)) => PinnedModel::unknown(error),
        Err(message) => PinnedModel::Unknown { message, help: None, wrong: true },
    };
    let identity = match &model {
        PinnedModel::Hub { repository, commit } => format!("{repository}@{commit}"),
        PinnedModel::Folder(snapshot) => store.digest(snapshot)?.digest.hex(),
        PinnedModel::Unknown { .. } => format!("{name}, not resolved"),
    };
    Ok(Pinned { model, identity })
}

#[cfg(test)]
mod tests {
    use grlm_cache::Access;

    use super::*;

    #[test]
    fn a_folder_is_its_content_and_a_commit_is_itself() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), Access::Write).unwrap();
        let folder = dir.path().join("model");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("config.json"), "{}").unwrap();
        let no_network = |name: &str| (name == "HF_HUB_OFFLINE").then(|| "1".to_owned());
        let hub = Hub::new(&no_network, PATIENCE);
        let identity = |name: &str| pin(&store, &hub, name).unwrap().identity;
        let name = folder.display().to_string();
        let first = identity(&name);
        std::fs::write(folder.join("config.json"), "{ }").unwrap();
        assert_ne!(identity(&name), first);
        let commit = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(identity(&format!("org/name@{commit}")), format!("org/name@{commit}"));
        let unknown = pin(&store, &hub, "org/name").unwrap().model;
        let PinnedModel::Unknown { help: Some(help), wrong: true, .. } = unknown else { panic!("{unknown:?}") };
        assert!(help.contains("HF_HUB_OFFLINE"), "{help}");
        assert!(pin(&store, &hub, "/no/such/folder").is_err());
    }

    /// Of a commit that another program fetched in part, every further file makes another model.
    #[test]
    fn what_another_program_left_in_the_hub_s_cache_is_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), Access::Write).unwrap();
        let (home, commit) = (dir.path().display().to_string(), "0123456789abcdef0123456789abcdef01234567");
        let offline = |name: &str| match name {
            "HF_HOME" => Some(home.clone()),
            "HF_HUB_OFFLINE" => Some("1".to_owned()),
            _ => None,
        };
        let hub = Hub::new(&offline, PATIENCE);
        let repository = dir.path().join("hub/models--org--name");
        let snapshot = repository.join("snapshots").join(commit);
        std::fs::create_dir_all(snapshot.join("1_Pooling")).unwrap();
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        let name = format!("org/name@{commit}");
        let identity = || pin(&store, &hub, &name).unwrap().identity;
        let in_part = identity();
        assert!(matches!(pin(&store, &hub, &name).unwrap().model, PinnedModel::Folder(folder) if folder == snapshot));
        std::fs::write(snapshot.join("1_Pooling/config.json"), "{}").unwrap();
        assert_ne!(identity(), in_part);
        std::fs::create_dir(repository.join(".grlm")).unwrap();
        std::fs::write(repository.join(".grlm").join(commit), "").unwrap();
        assert_eq!(identity(), name, "all of it is there");
    }
}
