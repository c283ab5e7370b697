//! The files on disk that a pipeline names: they exist, and are files or folders as the ports want.

use std::{fs, io};

use super::{
    InputSource, Stage,
    mistake::{Mistake, path},
};

/// What is wrong with the files that these stages name.
pub(super) fn mistakes(stages: &[Stage]) -> Vec<Mistake> {
    stages.iter().flat_map(of_stage).collect()
}

fn of_stage(stage: &Stage) -> Vec<Mistake> {
    let name = stage.name.as_str();
    let mut mistakes = Vec::new();
    for (port, source) in &stage.inputs {
        let InputSource::File(file) = source else { continue };
        let at = path(&["stages", name, "inputs", port, "file"]);
        let shown = file.display();
        match fs::metadata(file) {
            Err(e) => mistakes.push(missing(stage, &at, &shown.to_string(), &e)),
            Ok(metadata) => match wants_folder(stage, port) {
                Some(true) if !metadata.is_dir() => {
                    mistakes.push(Mistake::value(&at, format!("`{shown}` is a file; port `{port}` takes a folder")));
                }
                Some(false) if metadata.is_dir() => {
                    mistakes.push(Mistake::value(&at, format!("`{shown}` is a folder; port `{port}` takes a file")));
                }
                _ => {}
            },
        }
    }
    for (i, code) in stage.code.iter().enumerate() {
        if let Err(e) = fs::metadata(code) {
            let at = path(&["stages", name, "code", &i.to_string()]);
            mistakes.push(missing(stage, &at, &code.display().to_string(), &e));
        }
    }
    mistakes
}

fn missing(stage: &Stage, at: &[String], shown: &str, error: &io::Error) -> Mistake {
    if error.kind() == io::ErrorKind::NotFound {
        // Whoever wrote the stage may have said where its file comes from.
        let about = stage.description.as_deref().map(|d| format!("; about `{}`: {}", stage.name, d.trim()));
        let help = format!("paths are relative to the folder that you run `grlm` in{}", about.unwrap_or_default());
        Mistake::value(at, format!("`{shown}` does not exist")).help(help)
    } else {
        Mistake::value(at, format!("cannot read `{shown}`: {error}"))
    }
}

/// Whether a port takes a folder; `None` if it takes either.
fn wants_folder(stage: &Stage, port: &str) -> Option<bool> {
    let ports = stage.kind.ports(&stage.params).ok()?;
    let artifact = ports.inputs.iter().find(|i| i.name == port).map(|i| i.artifact).or(ports.open_inputs)?;
    (artifact != grlm_stages::Artifact::Any).then(|| artifact.is_folder())
}
