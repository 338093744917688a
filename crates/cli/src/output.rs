//! What commands print: text and JSON to standard output, errors to standard error.

use std::io::{self, Write};

use serde::Serialize;

use crate::exit::{ExitCode, Failure};

/// Prints text. A reader that went away has seen enough: that is no error.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(
            ExitCode::Io,
            format!("cannot write to standard output: {error}"),
        )),
        _ => Ok(()),
    }
}

/// Prints a value as indented JSON.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::from_error(ExitCode::Internal, &error))?;
    text.push('\n');
    print(&text)
}

/// Prints lines to standard error in one piece.
pub fn error_line(text: &str) -> io::Result<()> {
    io::stderr().write_all(format!("{text}\n").as_bytes())
}

/// Rows of cells as lines with aligned columns, the last one ragged.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["a", "long", "x"], ["bcd", "e", ""]]
            .map(|row| row.map(str::to_owned).to_vec())
            .to_vec();
        assert_eq!(table(&rows), "a    long  x\nbcd  e\n");
    }
}
