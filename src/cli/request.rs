//! What `run`, `plan` and their kin have in common: a pipeline file, a selection, parts of it, and the store.

use std::{path::PathBuf, sync::Arc};

use grlm_cache::{Access, Store, StoreError};

use super::Global;
use crate::{
    device::{self, Machine, discover},
    engine::{
        run::RunError,
        work::{Parts, PartsError, Permission, Work},
    },
    error::CliError,
    exit_codes::Code,
    pipeline::{self, Selection, hint},
};

/// A pipeline as a user selects it
#[derive(Debug, Clone, clap::Args)]
pub struct Selected {
    /// The pipeline file
    pub file: PathBuf,
    /// A variant, or a cell of a matrix as in `lr[train.with.lr=1e-4]`
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
    /// Another value for one path, as in `train.with.lr=1e-4` or `vars.data=folder`; may be repeated
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = assignment)]
    pub set: Vec<(String, String)>,
}

/// Which stages are meant
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Part {
    /// These stages and all that they need
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    pub until: Vec<String>,
    /// These stages and all that depends on them; what they need must be up to date
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    pub from: Vec<String>,
    /// These stages and no others; what they need must be up to date
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Run these stages even if they are up to date
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    pub force: Vec<String>,
}

pub fn assignment(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .filter(|(path, _)| !path.is_empty())
        .map(|(path, value)| (path.to_owned(), value.to_owned()))
        .ok_or_else(|| "expected PATH=VALUE".to_owned())
}

impl Selected {
    pub fn selection(&self) -> Selection {
        Selection { variant: self.variant.clone(), set: self.set.clone() }
    }

    /// Loads the pipeline and checks the files that it names.
    pub fn load(&self) -> Result<pipeline::Pipeline, CliError> {
        Ok(pipeline::load(&self.file, &self.selection())?)
    }
}

impl Part {
    /// The whole pipeline, nothing forced.
    pub fn is_everything(&self) -> bool {
        self.parts().is_everything()
    }

    fn parts(&self) -> Parts {
        Parts { until: self.until.clone(), from: self.from.clone(), only: self.only.clone(), force: self.force.clone() }
    }
}

/// The graph of these pipelines; missing files and unknown stage names are told.
pub fn work(pipelines: Vec<pipeline::Pipeline>, part: &Part) -> Result<Work, CliError> {
    pipeline::check_files(&pipelines)?;
    work_unchecked(pipelines, part)
}

/// The same, whether or not the files are there.
pub fn work_unchecked(pipelines: Vec<pipeline::Pipeline>, part: &Part) -> Result<Work, CliError> {
    Work::new(pipelines, &part.parts()).map_err(|error| {
        let (code, help) = match &error {
            PartsError::UnknownStage { name, known } => {
                let help = hint::help(name, known.iter().map(String::as_str));
                (Code::Pipeline, help.or_else(|| Some("`grlm plan FILE` lists the stages".to_owned())))
            }
            PartsError::ForcedOutside { options, .. } => {
                (Code::Usage, Some(format!("choose it as well, or leave {} out", options.join(" and "))))
            }
        };
        CliError::message(code, error.to_string(), help)
    })
}

pub fn open_store(global: &Global, access: Access) -> Result<Arc<Store>, CliError> {
    Ok(Arc::new(Store::open(&global.store, access)?))
}

/// The machine to run on, and a check that every stage that may run can have what it wants.
pub fn machine(devices: &device::Selection, work: &Work) -> Result<Machine, CliError> {
    let machine = discover(devices, work)?;
    check_fits(&machine, work)?;
    Ok(machine)
}

fn wanted(work: &Work) -> impl Iterator<Item = usize> {
    (0..work.nodes.len()).filter(|&id| work.nodes[id].permission != Permission::Leave)
}

/// The machine with these devices; GPUs are looked for if a stage asks for one.
pub fn discover(devices: &device::Selection, work: &Work) -> Result<Machine, CliError> {
    let with_gpus = wanted(work).any(|id| work.stage(id).resources.gpus > 0);
    discover::machine(devices, with_gpus).map_err(|e| CliError::message(Code::Resources, e.to_string(), Some(e.help())))
}

/// Refuses a stage that needs more than there is.
pub fn check_fits(machine: &Machine, work: &Work) -> Result<(), CliError> {
    let pool = device::Pool::new(machine);
    for id in wanted(work) {
        if let Err(unfit) = pool.check(work.stage(id).resources.into()) {
            let message = format!("stage `{}` cannot run here: it {unfit}", work.nodes[id].label);
            let made_up = machine.gpus.iter().any(|gpu| gpu.simulated);
            let which = if made_up { "the made-up machine" } else { "this machine" };
            let stage = work.stage(id);
            let fitting = stage.kind.fitting(&stage.params, machine.memory).map(|advice| format!("{advice}; or "));
            let fitting = fitting.unwrap_or_default();
            let help = format!("{which}: {machine}; {fitting}change `--devices`, or the stage's `resources:`");
            return Err(CliError::message(Code::Resources, message, Some(help)));
        }
    }
    Ok(())
}

/// Simulated devices are for planning, and for commands: a stage that computes would leave a result that claims to
/// come from a GPU.
pub fn check_simulated(machine: &Machine, work: &Work) -> Result<(), CliError> {
    if !machine.gpus.iter().any(|gpu| gpu.simulated) {
        return Ok(());
    }
    let computes = |id: &usize| {
        let stage = work.stage(*id);
        stage.kind.floating_point() && stage.resources.gpus > 0 && work.nodes[*id].permission != Permission::Leave
    };
    match (0..work.nodes.len()).find(computes) {
        None => Ok(()),
        Some(id) => Err(CliError::message(
            Code::Resources,
            format!("stage `{}` cannot run on simulated devices", work.nodes[id].label),
            Some("`grlm plan` takes them; to run it on the CPU, set its `resources.gpus` to 0".into()),
        )),
    }
}

impl From<StoreError> for CliError {
    fn from(error: StoreError) -> Self {
        let help = error.help();
        let message = error.to_string();
        match std::error::Error::source(&error).map(ToString::to_string) {
            Some(cause) => CliError::message(Code::Store, format!("{message}: {cause}"), help),
            None => CliError::message(Code::Store, message, help),
        }
    }
}

impl From<RunError> for CliError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Store(error) => error.into(),
            RunError::Journal(error) => {
                let cause = std::error::Error::source(&error).map(|c| format!(": {c}")).unwrap_or_default();
                CliError::message(
                    Code::Store,
                    format!("{error}{cause}"),
                    Some("is there space left on the disk?".into()),
                )
            }
            RunError::Devices(error) => {
                let cause = std::error::Error::source(&error).map(|c| format!(": {c}")).unwrap_or_default();
                let help = "leases of devices are kept there; GRLM_LEASES names another place".to_owned();
                CliError::message(Code::Resources, format!("{error}{cause}"), Some(help))
            }
            RunError::File { message, help } => CliError::message(Code::Pipeline, message, help),
            RunError::Show { ref source, .. } => {
                let cause = std::error::Error::source(source).map(|c| format!(": {c}")).unwrap_or_default();
                let help = source.help().unwrap_or_else(|| {
                    "move away what is in its place, or show results elsewhere with `--out FOLDER`".to_owned()
                });
                CliError::message(Code::Store, format!("{error}: {source}{cause}"), Some(help))
            }
            RunError::Io { action, source } => {
                CliError::message(Code::Internal, format!("cannot {action}: {source}"), None)
            }
        }
    }
}
