//! `grlm dag`: the graph of a pipeline, as text or for drawing.

use super::request::Selected;
use crate::{
    error::CliError,
    exit_codes::Code,
    graph,
    pipeline::{InputSource, Pipeline},
};

/// Draw the graph of a pipeline
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    selected: Selected,
    /// For reading, for Graphviz, or for Markdown
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    Text,
    Dot,
    Mermaid,
}

pub fn run(args: &Args) -> Result<Code, CliError> {
    let pipeline = args.selected.load()?;
    let quoted = |i: usize| format!("{:?}", pipeline.stages[i].name.as_str());
    match args.format {
        Format::Text => {
            for i in graph::order(&pipeline) {
                let stage = &pipeline.stages[i];
                let from: Vec<&str> =
                    producers(&pipeline, i).into_iter().map(|p| pipeline.stages[p].name.as_str()).collect();
                let arrow = if from.is_empty() { String::new() } else { format!(" ← {}", from.join(", ")) };
                println!("{} ({}){arrow}", stage.name, stage.kind.name());
            }
        }
        Format::Dot => {
            println!("digraph {:?} {{\n  rankdir=LR; node [shape=box];", pipeline.name);
            for (i, stage) in pipeline.stages.iter().enumerate() {
                println!("  {} [label=\"{}\\n{}\"];", quoted(i), stage.name, stage.kind.name());
                for p in producers(&pipeline, i) {
                    println!("  {} -> {};", quoted(p), quoted(i));
                }
            }
            println!("}}");
        }
        Format::Mermaid => {
            println!("graph LR");
            for (i, stage) in pipeline.stages.iter().enumerate() {
                println!("  s{i}[\"{}<br/><small>{}</small>\"]", stage.name, stage.kind.name());
                for p in producers(&pipeline, i) {
                    println!("  s{p} --> s{i}");
                }
            }
        }
    }
    Ok(Code::Ok)
}

/// The stages that a stage reads from, each once, in the order of the file.
fn producers(pipeline: &Pipeline, stage: usize) -> Vec<usize> {
    let mut from: Vec<usize> = pipeline.stages[stage]
        .inputs
        .values()
        .filter_map(|source| match source {
            InputSource::Stage { stage, .. } => Some(*stage),
            InputSource::File(_) => None,
        })
        .collect();
    from.sort_unstable();
    from.dedup();
    from
}
